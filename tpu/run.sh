#!/usr/bin/env bash
# Start a command on every worker of a slice, show worker 0's output, and end with the command's exit status.
#
#   tpu/run.sh NAME -- pretrain --preset gpu --mesh.fsdp 16 --run runs/first     an experiment, by its name
#   tpu/run.sh NAME -- python my_program.py                                      or anything else
#   tpu/run.sh NAME                                                              show the run that goes on
#   tpu/run.sh NAME --stop                                                       end it (SIGTERM, so that it can save)
#
# The run does not need this terminal: Ctrl-C, or a lost connection, only ends the showing.
# Exit status: the command's (the worst of all workers); 75 if the slice was taken away; 2 for a mistake in the call.
. "$(dirname "$0")/lib.sh"
read_arguments "$@"

worker=jaxgpt/tpu/worker.sh
if [ "$STOP" = 1 ]; then
  on_workers all "$worker stop"
  exit
fi
if [ ${#REST[@]} -gt 0 ]; then
  if [[ ${REST[0]} =~ ^[a-z_]+$ && -f $REPOSITORY/experiments/${REST[0]}.py ]]; then
    join=()
    [ "$HOSTS" = 1 ] || join=(--distributed auto)
    REST=(python -m "experiments.${REST[0]}" ${join[@]+"${join[@]}"} "${REST[@]:1}")
  fi
  on_workers all "$worker start $(quoted "${REST[@]}")"
fi
if [ "$DRY_RUN" = 1 ]; then
  on_workers 0 "$worker show"
  on_workers all "$worker status"
  exit
fi

trap 'kill "${shown:-}" 2>/dev/null; say "the run goes on; tpu/run.sh $NAME shows it, --stop ends it"; exit 130' INT
on_workers 0 "$worker show" &
shown=$!
alone=0  # looks since a worker failed while others went on
while :; do
  sleep "$POLL"
  if ! states=$(on_workers all "$worker status" 2>/dev/null); then
    state=$(slice_state)
    if [ "$state" = GONE ] || [ "$state" = ABSENT ]; then
      kill "$shown" 2>/dev/null || true
      say "the slice was taken away"
      exit 75
    fi
    continue
  fi
  kill -0 "$shown" 2>/dev/null || { on_workers 0 "$worker show" & shown=$!; }  # the connection was lost
  codes=$(grep -oE 'exited [0-9]+' <<<"$states" | awk '{ print $2 }' | sort -n || true)
  if ! grep -q running <<<"$states"; then
    [ -n "$codes" ] || { say "nothing was started on $NAME"; exit 2; }
    break
  fi
  if [ -n "$codes" ] && [ "$(tail -n 1 <<<"$codes")" -gt 0 ]; then  # the others would wait for ever
    alone=$((alone + 1))
    [ "$alone" -lt 3 ] || { say "a worker failed; stopping the others"; on_workers all "$worker stop" || true; }
  fi
done
sleep 1
kill "$shown" 2>/dev/null || true
# A failure is what counts, not the SIGTERM (143) that the others got after it, nor 75 beside it.
code=$(grep -vxE '0|143|75' <<<"$codes" | head -n 1 || true)
[ -n "$code" ] || code=$(tail -n 1 <<<"$codes")
[ "$code" != 143 ] || code=75
say "ended with $code"
exit "$code"
