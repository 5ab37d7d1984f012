#!/usr/bin/env bash
# Starts `glm45 train CONFIG key=value …` in all workers of all slices, detached from this terminal. CONFIG is a path in
# the checkout (run setup.sh again after changing it), or an absolute one on the workers. The command is remembered:
# resume.sh starts the same.
#
#   bash scripts/tpu_vm/launch.sh recipes/mini.yaml output_dir=gs://my-bucket/runs/mini
#   bash scripts/tpu_vm/launch.sh --log-dir gs://my-bucket/logs --set-env HF_TOKEN=abc recipes/mini.yaml steps=1000
#   bash scripts/tpu_vm/launch.sh --restart recipes/mini.yaml data.sources.0.path='gs://my-bucket/two words/*.txt'
#
# flags, before CONFIG; what follows it is for glm45 train:
#   --set-env KEY=VALUE   a variable for the run; may be repeated
#   --log-dir gs://…      copy each worker's log there every minute
#   --restart             stop a run that is there first (it saves), then start
#
# Several slices find each other by what Google writes into each VM's metadata (MEGASCALE_COORDINATOR_ADDRESS,
# MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID); nothing has to be set.
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

check_config() {
  local config=$1
  [[ $config == /* || -f $CHECKOUT/$config ]] ||
    fail "$config: no such file in the checkout ($CHECKOUT). Put it there and run setup.sh, or name its absolute path on \
the workers"
}

# A run that saves on the workers' own disks loses everything with them.
warn_of_local_output() {
  local text
  text=$(printf '%s\n' "$@"; [[ ! -f $CHECKOUT/$1 ]] || cat "$CHECKOUT/$1")
  grep -qE 'output_dir[=:] *["'\'']?(gs://|/)' <<<"$text" ||
    say "warning: no output_dir=gs://… here: checkpoints on the workers' own disks are gone when the TPU is preempted"
}

check_free() {
  local states
  states=$(worker_states) || fail "not every worker answers; status.sh shows more"
  grep -q ' not-set-up$' <<<"$states" && fail "not every worker is set up; run setup.sh"
  grep -q ' running$' <<<"$states" || return 0
  ((restart)) || fail "$NAME is running already. Follow it with logs.sh, stop it with stop.sh, or launch with --restart"
  on_all_workers "$(worker_command stop "$NAME")" || fail "the run could not be stopped in every worker"
}

restart=0 options=()
while (($#)); do
  case $1 in
    --restart) restart=1 TAKEN=1 ;;
    --set-env)
      [[ ${2-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--set-env needs KEY=VALUE, found '${2-}'"
      options+=("$1" "$2") TAKEN=2
      ;;
    --log-dir)
      [[ ${2-} == gs://* ]] || fail "--log-dir needs a gs:// path, found '${2-}'"
      options+=("$1" "$2") TAKEN=2
      ;;
    -*) common_flag "$@" ;;
    *) break ;;
  esac
  shift "$TAKEN"
done
(($#)) || fail "no configuration. For example: launch.sh recipes/mini.yaml steps=1000"
load_settings
check_config "$1"
warn_of_local_output "$@"

((DRY_RUN)) || {
  check_free
  rm -f "$STATE/stopped" # of an earlier run; a stop.sh from now on counts
}
if ! on_all_workers "$(worker_command start "$NAME" "${options[@]}" -- .venv/bin/glm45 train "$@")"; then
  # A run in some of the workers would wait for the others until it times out.
  on_all_workers "$(worker_command stop "$NAME")" || true
  fail "the run was not started in every worker, and was stopped where it was. Mended, launch again"
fi
[[ -f $STATE/tpu.env ]] || remember_settings # of a TPU that another machine created
remember launch "${options[@]}" "$@"
((DRY_RUN)) || say "$NAME runs; follow it with logs.sh, keep it running through preemptions with resume.sh"
