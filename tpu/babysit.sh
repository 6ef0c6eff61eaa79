#!/usr/bin/env bash
# See a run through to its end on a slice that may be preempted: create, set up, run; again after each preemption.
#
#   tpu/babysit.sh NAME --tpu v6e:4x4 --zone us-east5-b --spot --bucket BUCKET -- assistant --run runs/mine
#
# Takes create.sh's options. Needs --bucket: what a run has saved must outlive its slice. Finished stages are not run
# again. If babysit.sh itself is restarted, it follows the run still in progress. Deletes the slice at the end, unless
# --keep is given. Stops on a usage error of the command (exit status 2), or after three failures in a row. --dry-run
# prints the commands of one round.
. "$(dirname "$0")/lib.sh"
read_arguments "$@"

[ ${#REST[@]} -gt 0 ] || fail "babysit.sh needs a command, after --"
[ -n "$BUCKET" ] || fail "babysit.sh needs --bucket: without one a run is lost with its slice"
here=$TPU_FOLDER

if [ "$DRY_RUN" = 1 ]; then
  "$here/create.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"}
  "$here/setup.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"}
  "$here/run.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} -- "${REST[@]}"
  [ "$KEEP" = 1 ] || "$here/delete.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"}
  exit
fi

finish() {
  if [ "$KEEP" = 1 ]; then
    say "the slice still exists and costs money; delete it with tpu/delete.sh $NAME"
  else
    "$here/delete.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} || say "could not delete $NAME; look for it at console.cloud.google.com"
  fi
  exit "$1"
}

failures=0
while :; do
  state=$(slice_state)
  case "$state" in
    UNKNOWN)
      sleep "$POLL"
      continue ;;
    WAITING)
      sleep "$POLL"
      continue ;;
    GONE)
      say "$(date -u '+%F %T') the slice is gone; requesting another"
      "$here/delete.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} || sleep "$POLL"
      continue ;;
    ABSENT)
      code=0
      "$here/create.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} || code=$?
      [ "$code" != 2 ] || exit 2
      [ "$code" = 0 ] || sleep "$POLL"
      continue ;;
  esac
  began=$SECONDS
  code=0
  states=$(on_workers all 'jaxgpt/tpu/worker.sh status' 2>/dev/null || true)
  if grep -q running <<<"$states"; then
    "$here/run.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} || code=$?  # started by an earlier babysit.sh: only follow it
  else
    { "$here/setup.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} && "$here/run.sh" "$NAME" ${FLAGS[@]+"${FLAGS[@]}"} -- "${REST[@]}"; } ||
      code=$?
  fi
  say "$(date -u '+%F %T') the round ended with exit status $code"
  [ $((SECONDS - began)) -lt 3600 ] || failures=0
  case "$code" in
    0 | 2) finish "$code" ;;
    75) ;;  # stopped after saving, or preempted: resume
    *)
      state=$(slice_state)
      [ "$state" = READY ] || continue  # the slice failed, not the run
      failures=$((failures + 1))
      [ "$failures" -lt 3 ] || { say "three failures in a row"; finish "$code"; } ;;
  esac
done
