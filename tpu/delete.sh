#!/usr/bin/env bash
# Delete a slice and everything created for it. The bucket and its contents stay.
#
#   tpu/delete.sh NAME [--dry-run]
. "$(dirname "$0")/lib.sh"
read_arguments "$@"

left=0
# Delete one resource; if it does not exist, that is not a failure.
remove() {
  local message
  if [ "$DRY_RUN" = 1 ]; then
    run "$@"
  elif ! message=$("$@" 2>&1); then
    grep -qiE 'not[_ ]found' <<<"$message" || { echo "$message" >&2; left=1; }
  fi
}

if [ "$VIA" = queued ]; then
  remove gcloud compute tpus queued-resources delete "$NAME" "${GCLOUD[@]}" --force --quiet
else
  remove gcloud compute instance-groups managed delete "$NAME" "${GCLOUD[@]}" --quiet
  remove gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --region="$REGION" --quiet
  [ "$HOSTS" = 1 ] ||
    remove gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="$REGION" --quiet
fi
[ "$DRY_RUN" = 0 ] || exit 0
if [ "$left" = 1 ]; then
  echo "error: $NAME may still exist and cost money; run this again" >&2
  exit 1
fi
rm -f "$SLICES/$NAME.env"
say "deleted $NAME"
