#!/usr/bin/env bash
# Request a Cloud TPU slice, and wait until it is ready.
#
#   tpu/create.sh NAME --tpu v6e:4x4 --zone us-east5-b [--spot] [--bucket BUCKET] [--project ID] [-- GCLOUD FLAGS]
#
#   --tpu GENERATION:TOPOLOGY   v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:2x4, tpu7x:2x2x2 (chips along each dimension)
#   --spot                      cheaper, may be preempted at any time (tpu/babysit.sh requests it again)
#   --bucket BUCKET             a Cloud Storage bucket that every worker mounts as the folder runs/
#   --via queued|mig            queued resources, or a managed instance group (the default for v5p, v6e, tpu7x)
#   --dry-run                   only print the commands
#   -- GCLOUD FLAGS             passed on to gcloud's create command, such as --reserved or --network=mine
#
# Afterwards, the other scripts need only NAME. The slice costs money from now until tpu/delete.sh NAME.
. "$(dirname "$0")/lib.sh"
read_arguments "$@"

if [ "$DRY_RUN" = 0 ]; then
  state=$(slice_state)
  [ "$state" = ABSENT ] || [ "$state" = UNKNOWN ] ||
    fail "slice '$NAME' already exists in $ZONE ($state); remove it with tpu/delete.sh $NAME"
  mkdir -p "$SLICES"
  for setting in PROJECT ZONE TPU VIA SPOT BUCKET; do printf '%s=%q\n' "$setting" "${!setting}"; done >"$SLICES/$NAME.env"
fi

if [ "$VIA" = queued ]; then
  more=()
  [ "$SPOT" = 0 ] || more+=(--spot)
  run gcloud compute tpus queued-resources create "$NAME" "${GCLOUD[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --scopes=https://www.googleapis.com/auth/cloud-platform \
    ${more[@]+"${more[@]}"} ${REST[@]+"${REST[@]}"}
else
  provisioning=(--provisioning-model=STANDARD)
  [ "$SPOT" = 0 ] || provisioning=(--provisioning-model=SPOT --instance-termination-action=STOP)
  run gcloud compute instance-templates create "$NAME" --project="$PROJECT" --instance-template-region="$REGION" \
    --machine-type="$MACHINE" --image-project=ubuntu-os-accelerator-images --image-family="$IMAGE" \
    --boot-disk-size=200GB ${DISK[@]+"${DISK[@]}"} --maintenance-policy=TERMINATE "${provisioning[@]}" \
    --scopes=https://www.googleapis.com/auth/cloud-platform ${REST[@]+"${REST[@]}"}
  group=(gcloud compute instance-groups managed create "$NAME" "${GCLOUD[@]}" --size="$HOSTS"
    --template="projects/$PROJECT/regions/$REGION/instanceTemplates/$NAME" --default-action-on-vm-failure=do-nothing)
  if [ "$HOSTS" -gt 1 ]; then  # the policy connects the hosts' chips; they are created all at once or not at all
    run gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="$REGION" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY" --accelerator-topology-mode=AUTO_CONNECT
    group+=(--workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME" --target-size-policy-mode=bulk)
  fi
  run "${group[@]}"
fi
[ "$DRY_RUN" = 0 ] || exit 0

say "requested $TPU ($CHIPS chips, $HOSTS hosts) in $ZONE; waiting (Ctrl-C keeps the request)"
while :; do
  state=$(slice_state)
  case "$state" in
    READY) break ;;
    GONE | ABSENT)
      say "the request failed; run tpu/delete.sh $NAME, then create it again in another zone or with fewer chips"
      exit 75 ;;
  esac
  sleep "$POLL"
done
say "ready; next: tpu/setup.sh $NAME"
