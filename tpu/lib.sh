# shellcheck shell=bash
# Sourced by the other scripts here: the settings of a slice, and the gcloud calls for both ways to create one.
# shellcheck disable=SC2034  # the variables set here are for those scripts
set -euo pipefail

TPU_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(dirname "$TPU_FOLDER")
SLICES=${JAXGPT_SLICES:-$TPU_FOLDER/slices}  # create.sh's settings, one file per slice
POLL=${JAXGPT_POLL:-30}                      # seconds between two polls of a slice

fail() {  # a usage error: nothing was done
  echo "error: $*" >&2
  exit 2
}

say() { echo "-- $*" >&2; }

usage() {  # the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# The words, quoted for a shell, in one line.
quoted() {
  local word flag text='' plain='^[A-Za-z0-9_./:=,@+-]+$' is_flag='^(--[a-z-]+=)(.*)$'
  for word in "$@"; do
    if ! [[ $word =~ $plain ]]; then
      flag=''
      if [[ $word =~ $is_flag ]]; then
        flag=${BASH_REMATCH[1]} word=${BASH_REMATCH[2]}
      fi
      word="$flag'${word//\'/\'\\\'\'}'"
    fi
    text+=" $word"
  done
  echo "${text# }"
}

# Run the command; with --dry-run, only print it.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# NAME [--flag value ...] [-- rest]: sets NAME, the slice's settings, DRY_RUN, the array REST, and FLAGS (all but the rest).
read_arguments() {
  NAME='' PROJECT='' ZONE='' TPU='' VIA='' SPOT=0 BUCKET='' DRY_RUN=0 STOP=0 KEEP=0 REST=() FLAGS=()
  local word
  case "${1:-}" in
    -h | --help | '') usage; [ -n "${1:-}" ] && exit 0; exit 2 ;;
    -*) fail "the slice's name must come first: $(basename "$0") NAME ... (--help shows more)" ;;
  esac
  NAME=$1
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "a slice's name must have up to 40 lower-case letters, digits and hyphens, and begin with a letter, not '$NAME'"
  if [ -f "$SLICES/$NAME.env" ]; then
    # shellcheck source=/dev/null
    . "$SLICES/$NAME.env"
  fi
  shift
  while [ $# -gt 0 ]; do
    word=$1
    case "$word" in
      --) shift; REST=("$@"); break ;;
      --spot) SPOT=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --stop) STOP=1 ;;
      --keep) KEEP=1 ;;
      --project | --zone | --tpu | --via | --bucket)
        [ $# -ge 2 ] && [[ $2 != --* ]] || fail "$word needs a value"
        case "$word" in
          --project) PROJECT=$2 ;;
          --zone) ZONE=$2 ;;
          --tpu) TPU=$2 ;;
          --via) VIA=$2 ;;
          --bucket) BUCKET=${2#gs://} ;;
        esac
        FLAGS+=("$word")
        shift
        word=$1
        ;;
      *) fail "unknown option '$word' (--help lists them; the command's own options come after --)" ;;
    esac
    FLAGS+=("$word")
    shift
  done
  [ -n "$TPU" ] || fail "unknown slice '$NAME': give --tpu (such as v6e:4x4) and --zone, as for create.sh"
  [ -n "$ZONE" ] || fail "no zone: give --zone, such as us-east5-b (tpu/README.md lists zones for each generation)"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] || fail "'$ZONE' is not a zone (us-east5-b is one)"
  REGION=${ZONE%-*}
  describe_slice
  if [ "$DRY_RUN" = 0 ]; then
    command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  fi
  if [ -z "$PROJECT" ]; then
    PROJECT=$(gcloud config get-value project 2>/dev/null || true)
    if [ -z "$PROJECT" ] || [ "$PROJECT" = '(unset)' ]; then
      fail "no project: give --project ID, or run gcloud config set project ID once"
    fi
  fi
  GCLOUD=(--project="$PROJECT" --zone="$ZONE")
}

# From TPU (generation:topology), set CHIPS, HOSTS, VIA, and gcloud's names for the slice.
describe_slice() {
  local generation=${TPU%%:*} topology=${TPU#*:} factors cores
  [[ $TPU =~ ^[a-z0-9]+:[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
    fail "--tpu must be a generation and a topology, such as v5e:4x4, v5p:2x2x2 or v6e:2x4, not '$TPU'"
  factors=${topology//x/ }
  CHIPS=1
  for factor in $factors; do CHIPS=$((CHIPS * factor)); done
  [ "$CHIPS" -gt 0 ] || fail "--tpu $TPU has no chips"
  case "$generation" in
    v5e | v6e) [ "$(wc -w <<<"$factors")" = 2 ] || fail "a $generation topology has two dimensions (such as 4x4), not $topology" ;;
    v4 | v5p | tpu7x)
      [ "$(wc -w <<<"$factors")" = 3 ] || fail "a $generation topology has three dimensions (such as 2x2x2), not $topology"
      [ $((CHIPS % 4)) = 0 ] || fail "a $generation slice consists of hosts with 4 chips (such as 2x2x1), not $topology" ;;
    *) fail "unknown generation '$generation'; known: v4, v5e, v5p, v6e, tpu7x" ;;
  esac
  TOPOLOGY=$topology
  cores=$((2 * CHIPS))
  MACHINE='' IMAGE=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e DISK=()
  case "$generation" in
    v4) ACCELERATOR=v4-$cores RUNTIME=tpu-ubuntu2204-base ;;
    v5e) ACCELERATOR=v5litepod-$CHIPS RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p) ACCELERATOR=v5p-$cores RUNTIME=v2-alpha-tpuv5 MACHINE=ct5p-hightpu-4t ;;
    v6e) ACCELERATOR=v6e-$CHIPS RUNTIME=v2-alpha-tpuv6e MACHINE=ct6e-standard-4t ;;
    tpu7x) ACCELERATOR='' RUNTIME='' MACHINE=tpu7x-standard-4t IMAGE=ubuntu-accel-2404-amd64-tpu-tpu7x
      DISK=(--boot-disk-type=hyperdisk-balanced) ;;
  esac
  HOSTS=$(((CHIPS + 3) / 4))
  case "$TPU" in  # a single host may also have one or eight chips
    v6e:1x1) MACHINE=ct6e-standard-1t ;;
    v6e:2x4) MACHINE=ct6e-standard-8t HOSTS=1 ;;
    v5e:2x4) HOSTS=1 ;;
  esac
  case "$VIA" in
    '') if [ -n "$MACHINE" ]; then VIA=mig; else VIA=queued; fi ;;
    queued) [ -n "$ACCELERATOR" ] || fail "$generation is available with --via mig or GKE only" ;;
    mig) [ -n "$MACHINE" ] || fail "$generation is available with --via queued only" ;;
    *) fail "--via must be queued (queued resources) or mig (a managed instance group), not '$VIA'" ;;
  esac
}

# Print ABSENT, WAITING, READY, GONE (preempted, failed or being deleted), or UNKNOWN (gcloud failed).
slice_state() {
  local answer error states
  error=$(mktemp)
  if [ "$VIA" = queued ]; then
    answer=$(gcloud compute tpus queued-resources describe "$NAME" "${GCLOUD[@]}" --format='value(state.state)' 2>"$error") ||
      answer=FAILED_CALL
    if [ "$answer" = ACTIVE ]; then
      answer=$(gcloud compute tpus tpu-vm describe "$NAME" "${GCLOUD[@]}" --format='value(state)' 2>"$error") ||
        answer=FAILED_CALL
    fi
    case "$answer" in
      READY) answer=READY ;;
      ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | ACTIVE | STARTING | RESTARTING | REPAIRING) answer=WAITING ;;
      FAILED_CALL) ;;
      '') answer=UNKNOWN ;;
      *) answer=GONE ;;
    esac
  else
    states=$(gcloud compute instance-groups managed list-instances "$NAME" "${GCLOUD[@]}" --format='value(instanceStatus)' \
      2>"$error") && answer='' || answer=FAILED_CALL
    if [ -z "$answer" ]; then
      if grep -qE 'STOP|TERMINATED|SUSPEND' <<<"$states"; then
        answer=GONE
      elif [ "$(grep -c RUNNING <<<"$states")" -ge "$HOSTS" ]; then
        answer=READY
      else
        answer=WAITING
      fi
    fi
  fi
  if [ "$answer" = FAILED_CALL ]; then
    if grep -qiE 'not[_ ]found' "$error"; then
      answer=ABSENT
    else
      sed 's/^/gcloud: /' "$error" >&2
      answer=UNKNOWN
    fi
  fi
  rm -f "$error"
  echo "$answer"
}

# Print the machines of an instance group, one per line.
instances() {
  local listing=(gcloud compute instance-groups managed list-instances "$NAME" "${GCLOUD[@]}" --format='value(NAME)')
  if [ "$DRY_RUN" = 1 ]; then
    run "${listing[@]}" >&2
    local i
    for ((i = 0; i < HOSTS; i++)); do echo "$NAME-$i"; done
  else
    "${listing[@]}"
  fi
}

# Run a shell command on one worker (0, 1, ...) or on all of them at once; fails if it fails on any.
on_workers() {
  local which=$1 command=$2 machine pids=() code=0 machines
  if [ "$VIA" = queued ]; then
    run gcloud compute tpus tpu-vm ssh "$NAME" "${GCLOUD[@]}" --worker="$which" --command="$command"
    return
  fi
  machines=$(instances) || return
  [ "$which" = all ] || machines=$(sed -n "$((which + 1))p" <<<"$machines")
  if [ "$DRY_RUN" = 1 ]; then
    for machine in $machines; do run gcloud compute ssh "$machine" "${GCLOUD[@]}" --command="$command"; done
    return
  fi
  for machine in $machines; do
    gcloud compute ssh "$machine" "${GCLOUD[@]}" --command="$command" </dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

copy_to_workers() {
  local file=$1 machine machines
  if [ "$VIA" = queued ]; then
    run gcloud compute tpus tpu-vm scp "$file" "$NAME:" "${GCLOUD[@]}" --worker=all
    return
  fi
  machines=$(instances) || return
  for machine in $machines; do run gcloud compute scp "$file" "$machine:" "${GCLOUD[@]}"; done
}

