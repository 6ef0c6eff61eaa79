#!/usr/bin/env bash
# Start a command on every worker of a slice, show worker 0's output, and exit with the command's status.
#
#   tpu/run.sh NAME -- pretrain --preset gpu --mesh.fsdp 16 --run runs/first     an experiment, by its name
#   tpu/run.sh NAME -- python my_program.py                                      or anything else
#   tpu/run.sh NAME                                                              follow the run in progress
#   tpu/run.sh NAME --stop                                                       stop it (SIGTERM, so that it can save)
#
# The run does not depend on this terminal: Ctrl-C or a lost connection only stops following it.
# Exit status: the command's (the worst of all workers); 75 if the slice was preempted; 2 for a usage error.
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

trap 'kill "${shown:-}" 2>/dev/null; say "the run continues; tpu/run.sh $NAME follows it, --stop stops it"; exit 130' INT
on_workers 0 "$worker show" &
shown=$!
alone=0  # polls since a worker failed while others kept running
while :; do
  sleep "$POLL"
  if ! states=$(on_workers all "$worker status" 2>/dev/null); then
    state=$(slice_state)
    if [ "$state" = GONE ] || [ "$state" = ABSENT ]; then
      kill "$shown" 2>/dev/null || true
      say "the slice is gone"
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
  if [ -n "$codes" ] && [ "$(tail -n 1 <<<"$codes")" -gt 0 ]; then  # the others would wait forever
    alone=$((alone + 1))
    [ "$alone" -lt 3 ] || { say "a worker failed; stopping the others"; on_workers all "$worker stop" || true; }
  fi
done
sleep 1
kill "$shown" 2>/dev/null || true
# Report the failure itself, not the 143 (SIGTERM) or 75 with which the others stopped after it.
code=$(grep -vxE '0|143|75' <<<"$codes" | head -n 1 || true)
[ -n "$code" ] || code=$(tail -n 1 <<<"$codes")
[ "$code" != 143 ] || code=75
say "ended with exit status $code"
exit "$code"
