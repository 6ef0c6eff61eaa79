#!/usr/bin/env bash
# Copy this working tree to every worker of a slice; install Python and jax for TPU; mount the bucket as runs/.
#
#   tpu/setup.sh NAME [--dry-run]
#
# Copies tracked and new files as they are now, without a commit or push. Run it again after a change.
. "$(dirname "$0")/lib.sh"
read_arguments "$@"

[ ${#REST[@]} = 0 ] || fail "setup.sh takes no command"
archive=jaxgpt.tar.gz
if [ "$DRY_RUN" = 0 ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  archive=$folder/jaxgpt.tar.gz
  (cd "$REPOSITORY" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf "$archive")
fi
copy_to_workers "$archive"
# Remove everything from an earlier copy, except what the worker made itself.
on_workers all "mkdir -p jaxgpt && find jaxgpt -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} + && \
tar -xzf jaxgpt.tar.gz -C jaxgpt && jaxgpt/tpu/worker.sh setup $(quoted "$BUCKET")"
[ "$DRY_RUN" = 1 ] || say "ready: tpu/run.sh $NAME -- pretrain --run runs/first"
