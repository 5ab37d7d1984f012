#!/usr/bin/env bash
# Keeps a run going until it is finished: looks at the TPU and its workers again and again, and does the next thing that
# is missing. A TPU that was preempted (SUSPENDED, FAILED, a slice PREEMPTED) is deleted and asked for anew, set up and
# given the same command as before; a run that crashed is started again. `glm45 train` goes on from its newest
# checkpoint, so output_dir must outlive the workers (gs://…). Needs an earlier create.sh, setup.sh and launch.sh from
# this machine. It may be stopped and started at any time; let it run where it stays, such as in tmux on a small VM.
#
#   bash scripts/tpu_vm/resume.sh
#   bash scripts/tpu_vm/resume.sh --poll 30 --max-failures 3
#
# flags:
#   --poll SECONDS        between two looks, 60 by default
#   --max-failures N      give up after N failures with no healthy run between them, 8 by default
#   --max-pause SECONDS   the wait after a failure doubles from --poll up to this, 900 by default
#   --healthy SECONDS     a run that all workers keep up so long is healthy, 600 by default
#
# ends with 0 when every worker has finished, or when stop.sh or delete.sh has ended the run; with 1 when it gives up.
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tell() {
  say "$(date +%T) $NAME: $*"
}

# Another command of this folder, with the settings that create.sh remembered.
command_of() {
  local name=$1
  shift
  bash "$TPU_VM/$name.sh" --env-file "$STATE/tpu.env" "$@"
}

# Counts a failure, waits longer than after the one before, and gives up at last.
count_failure() {
  failures=$((failures + 1)) healthy_since=""
  ((failures < max_failures)) ||
    fail "$NAME failed $failures times with no healthy run between: $*. logs.sh shows what the workers say; mended, \
run resume.sh again"
  tell "$* (failure $failures of $max_failures); waiting $pause s"
  sleep "$pause"
  pause=$((pause * 2 > max_pause ? max_pause : pause * 2))
}

note_health() {
  healthy_since=${healthy_since:-$SECONDS}
  if ((failures && SECONDS - healthy_since >= healthy)); then
    failures=0 pause=$poll
    tell "healthy again"
  fi
  sleep "$poll"
}

request_anew() {
  [[ -f $STATE/launch ]] || return 0 # delete.sh has been here
  command_of create --no-wait || count_failure "the request failed"
}

# A resource in a final state holds its name until it is deleted.
replace() {
  tell "$1: deleting it, to ask for a new one"
  if tpus queued-resources delete "$NAME" --force --quiet; then
    count_failure "$1"
  else
    count_failure "$1, and could not be deleted"
  fi
}

# A slice that is gone while the queued resource does not say so yet; its name and state.
lost_node() {
  local node state
  for node in $(nodes); do
    state=$(node_state "$node") || continue
    case $state in
      PREEMPTED | TERMINATED | STOPPED | DELETING | ABSENT) printf '%s is %s' "$node" "$state" && return ;;
    esac
  done
  return 1
}

set_up_and_launch() {
  local arguments
  mapfile -d '' -t arguments <"$STATE/setup"
  # A host that was repaired comes back empty, beside others that still wait for it.
  on_all_workers "$(where_set_up "$(worker_command stop "$NAME")" true)" || true
  command_of setup "${arguments[@]}" || {
    count_failure "setup failed"
    return
  }
  launch_again
}

launch_again() {
  local arguments
  [[ -f $STATE/launch && ! -f $STATE/stopped ]] || return 0 # delete.sh or stop.sh has been here
  mapfile -d '' -t arguments <"$STATE/launch"
  tell "launching: ${arguments[*]@Q}"
  command_of launch --restart "${arguments[@]}" || count_failure "launch failed"
}

# One look at the workers of an ACTIVE resource.
attend_workers() {
  local states lost ended
  if ! states=$(worker_states); then
    if lost=$(lost_node); then
      replace "$lost"
    else
      count_failure "not every worker answers"
    fi
  elif grep -q ' exited 2$' <<<"$states"; then
    fail "the command is refused (exit 2), and would be again: logs.sh says why. Launch a better one, then resume.sh"
  elif grep -q ' not-set-up$' <<<"$states"; then
    set_up_and_launch
  elif ! grep -qv ' exited 0$' <<<"$states"; then
    finished=1
  elif ! grep -qvE ' (running|exited 0)$' <<<"$states"; then
    note_health # some may finish before the others
  elif ! grep -qv ' idle$' <<<"$states"; then
    launch_again
  elif [[ -f $STATE/stopped ]]; then
    sleep "$poll" # stop.sh is at work
  else
    ended=$(grep -oE '(exited [1-9][0-9]*|lost|idle)$' <<<"$states" | sort | uniq -c | xargs)
    count_failure "the run ended in some workers ($ended)"
    launch_again
  fi
}

look() {
  local state
  state=$(queued_state) || {
    count_failure "gcloud did not answer"
    return
  }
  [[ $state == "$last_state" ]] || tell "$state"
  last_state=$state
  case $state in
    ACTIVE) attend_workers ;;
    ABSENT) request_anew ;;
    SUSPENDED | FAILED) replace "$state" ;;
    *) sleep "$poll" ;; # on its way: WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING, …
  esac
}

# What one recovery would call.
show_recovery() {
  tpus queued-resources describe "$NAME" --format='value(state.state)'
  tpus queued-resources delete "$NAME" --force --quiet
  command_of create --no-wait --dry-run
  mapfile -d '' -t arguments <"$STATE/setup"
  command_of setup --dry-run "${arguments[@]}"
  mapfile -d '' -t arguments <"$STATE/launch"
  command_of launch --dry-run --restart "${arguments[@]}"
}

poll=60 max_failures=8 max_pause=900 healthy=600
while (($#)); do
  case $1 in
    --poll | --max-failures | --max-pause | --healthy)
      [[ ${2-} =~ ^[0-9]+$ ]] || fail "$1 needs a number, found '${2-}'"
      key=${1#--}
      printf -v "${key//-/_}" '%s' "$2"
      TAKEN=2
      ;;
    *) common_flag "$@" ;;
  esac
  shift "$TAKEN"
done
load_settings
for file in tpu.env setup launch; do
  [[ -f $STATE/$file ]] ||
    fail "nothing to resume: $NAME was not created, set up and launched from this machine ($STATE/$file is missing)"
done
if ((DRY_RUN)); then
  show_recovery
  exit
fi

exec 8>"$STATE/lock"
flock -n 8 2>/dev/null || ! command -v flock >/dev/null || fail "another resume.sh watches $NAME already"
rm -f "$STATE/stopped"
failures=0 pause=$poll healthy_since="" last_state="" finished=0
until
  look
  ((finished))
do
  [[ ! -f $STATE/stopped ]] || { tell "stopped by stop.sh" && exit 0; }
  [[ -f $STATE/launch ]] || { tell "deleted by delete.sh" && exit 0; }
done
tell "the run is finished in every worker. The TPU still costs: delete.sh gives it back"
