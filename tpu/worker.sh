#!/usr/bin/env bash
# Runs on each worker of a slice, called by the other scripts.
#
#   worker.sh setup [BUCKET]     install Python and jax for TPU, mount the bucket as runs/
#   worker.sh start COMMAND...   run it in the background, with its output in run.log
#   worker.sh show               print the output until the command ends
#   worker.sh status             print "running", "exited CODE" or "idle"
#   worker.sh stop               send SIGTERM, and SIGKILL after two minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STATE=${JAXGPT_WORKER_STATE:-$HOME/.jaxgpt}
GCSFUSE=3.12.0
mkdir -p "$STATE"

status() {
  if [ -f "$STATE/exit" ]; then
    echo "exited $(cat "$STATE/exit")"
  elif [ -f "$STATE/pid" ] && kill -0 "$(cat "$STATE/pid")" 2>/dev/null; then
    echo running
  elif [ -f "$STATE/pid" ]; then
    echo "exited 137"  # killed before it could record its status
  else
    echo idle
  fi
}

setup() {
  local bucket=${1:-} python package
  if ! command -v make >/dev/null || ! python3 -c 'import ensurepip' 2>/dev/null; then
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=600 install -qq -y make python3-venv
  fi
  python=$(command -v python3)
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then  # the images have 3.10
    [ -x "$STATE/uv/bin/uv" ] || { "$python" -m venv "$STATE/uv" && "$STATE/uv/bin/pip" install -q uv; }
    "$STATE/uv/bin/uv" python install -q 3.12
    python=$("$STATE/uv/bin/uv" python find 3.12)
  fi
  make EXTRAS=tpu PYTHON="$python" set-up
  [ -n "$bucket" ] || return 0
  if ! command -v gcsfuse >/dev/null; then
    package=$STATE/gcsfuse.deb
    curl -fsSL -o "$package" \
      "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/gcsfuse_${GCSFUSE}_amd64.deb"
    sudo apt-get -o DPkg::Lock::Timeout=600 install -qq -y "$package"
  fi
  mkdir -p runs
  mountpoint -q runs || gcsfuse "$bucket" "$PWD/runs"
}

start() {
  [ "$(status)" != running ] || { echo "error: a run is in progress here (tpu/run.sh NAME follows it, --stop stops it)" >&2; exit 2; }
  rm -f "$STATE/exit" "$STATE/pid"
  : >"$STATE/run.log"
  # In its own session, it outlives the connection, and a signal reaches all its processes.
  # shellcheck disable=SC2016
  PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1 setsid bash -c '
    state=$1; shift
    trap "" HUP
    "$@" & child=$!
    trap "kill -TERM $child 2>/dev/null" TERM
    wait $child; code=$?
    while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
    echo $code >"$state/exit.new" && mv "$state/exit.new" "$state/exit"
  ' worker "$STATE" "$@" >"$STATE/run.log" 2>&1 </dev/null &
  echo $! >"$STATE/pid"
}

show() {
  local pid
  [ -f "$STATE/pid" ] || { echo "nothing was started here"; return; }
  pid=$(cat "$STATE/pid")
  tail -n +1 -F --pid="$pid" "$STATE/run.log" 2>/dev/null
}

stop() {
  local pid i
  [ "$(status)" = running ] || return 0
  pid=$(cat "$STATE/pid")
  kill -TERM "$pid" 2>/dev/null || true
  for ((i = 0; i < ${JAXGPT_STOP_SECONDS:-120}; i++)); do
    [ "$(status)" = running ] || return 0
    sleep 1
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
}

verb=${1:-}
shift || true
case "$verb" in
  setup | start | show | status | stop) "$verb" "$@" ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
