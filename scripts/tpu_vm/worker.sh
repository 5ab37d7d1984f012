#!/usr/bin/env bash
# What runs on a worker, called by the other commands of this folder over ssh. A run's folder is ~/glm45-runs/NAME: its
# log, and its exit_code once it has ended (0: finished).
#
#   worker.sh install EXTRAS                                          the environment of this checkout
#   worker.sh start NAME [--log-dir URL] [--set-env K=V]… -- COMMAND   the command, detached
#   worker.sh status NAME                                             a line `glm45-worker HOST STATE`
#   worker.sh stop NAME                                               SIGTERM, so that it saves; SIGKILL after GRACE seconds
set -euo pipefail

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
GRACE=${GLM45_STOP_GRACE:-600} # a large checkpoint takes its time

die() {
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

# --- install --------------------------------------------------------------------------------------------------------

# The images of TPU VMs come with Python 3.10; uv brings a newer one where there is none.
fetch_python() {
  python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find 3.12
}

install() {
  # shellcheck source=scripts/setup_env.sh
  source "$CHECKOUT/scripts/setup_env.sh"
  if [[ ! -e $CHECKOUT/.venv && -z ${PYTHON:-} ]] && ! (find_python) >/dev/null 2>&1; then
    PYTHON=$(fetch_python) || die "there is no Python 3.11 or newer, and uv could not bring one; the lines above say why"
    export PYTHON
  fi
  setup_env "$1"
  touch .venv/.ready
}

# --- a run ----------------------------------------------------------------------------------------------------------

# The lock is held as long as the supervisor or the command lives, and no longer, whatever ends them.
is_running() {
  [[ -f $RUN/lock ]] && ! flock -n "$RUN/lock" true
}

start() {
  [[ -f $CHECKOUT/.venv/.ready ]] || die "the project is not installed; run setup.sh"
  mkdir -p "$RUN"
  is_running && die "$NAME is running already"
  rm -f "$RUN/exit_code"
  cd "$CHECKOUT"
  # A session of its own: it outlives the ssh connection.
  setsid bash "$CHECKOUT/scripts/tpu_vm/worker.sh" supervise "$NAME" "$@" >>"$RUN/log" 2>&1 </dev/null &
  echo "$!" >"$RUN/pid"
  local tries
  for ((tries = 0; tries < 50; tries++)); do
    [[ -f $RUN/exit_code ]] || is_running || { sleep 0.1 && continue; }
    printf '%s: %s is started\n' "$(hostname)" "$NAME"
    return
  done
  die "$NAME did not start; its log: $(tail -n 5 "$RUN/log")"
}

supervise() {
  local log_dir="" child copier="" code=0
  exec 9>"$RUN/lock"
  flock -w 5 9 || die "$NAME is running already" # a look at the state holds it for a moment
  while [[ $1 != -- ]]; do
    case $1 in
      --log-dir) log_dir=$2 ;;
      --set-env) export "${2?}" ;;
      *) die "unknown option $1" ;;
    esac
    shift 2
  done
  shift
  printf '\n=== %s %s: %s\n' "$(date -Is)" "$(hostname)" "${*@Q}"
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
  [[ -z $log_dir ]] || {
    copy_log_often "$log_dir" 9>&- &
    copier=$!
  }
  # `wait` also ends when a signal comes, with the command still at work.
  while
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null
  do :; done
  printf '=== %s %s: exit code %d\n' "$(date -Is)" "$(hostname)" "$code"
  [[ -z $copier ]] || {
    kill "$copier" 2>/dev/null || true
    copy_log "$log_dir"
  }
  echo "$code" >"$RUN/exit_code.partial"
  mv "$RUN/exit_code.partial" "$RUN/exit_code"
}

copy_log() {
  gcloud storage cp --quiet "$RUN/log" "$1/$NAME/$(hostname).log" >/dev/null 2>&1 ||
    printf '=== the log could not be copied to %s\n' "$1"
}

copy_log_often() {
  while sleep 60; do
    copy_log "$1"
  done
}

status() {
  local state=idle
  if is_running; then
    state=running
  elif [[ -f $RUN/exit_code ]]; then
    state="exited $(<"$RUN/exit_code")"
  elif [[ -f $RUN/lock ]]; then
    state=lost
  fi
  printf 'glm45-worker %s %s\n' "$(hostname)" "$state"
}

stop() {
  local waited=0 pid
  is_running || { printf '%s: %s is not running\n' "$(hostname)" "$NAME" && return; }
  pid=$(<"$RUN/pid")
  # The supervisor hands it on; where it was killed, its group is what it left.
  kill -TERM "$pid" 2>/dev/null || kill -TERM -- "-$pid" 2>/dev/null || true
  while is_running; do
    if ((waited >= GRACE * 5)); then
      kill -KILL -- "-$pid" 2>/dev/null || die "$NAME cannot be ended; its processes: $(pgrep -g "$pid" | xargs)"
      break
    fi
    sleep 0.2
    waited=$((waited + 1))
  done
  printf '%s: %s is stopped\n' "$(hostname)" "$NAME"
}

(($# >= 2)) || die "usage: worker.sh install|start|status|stop …"
action=$1 NAME=$2 RUN=$HOME/glm45-runs/$2
shift 2
case $action in
  install) install "$NAME" ;;
  start) start "$@" ;;
  supervise) supervise "$@" ;;
  status) status ;;
  stop) stop ;;
  *) die "unknown action $action" ;;
esac
