#!/usr/bin/env bash
# Shows the state of the TPU and what each worker does: running, exited CODE (0: the run is finished), lost (its process
# is gone), idle or not-set-up.
#
#   bash scripts/tpu_vm/status.sh
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
  common_flag "$@"
  shift "$TAKEN"
done
load_settings
if ((DRY_RUN)); then
  tpus queued-resources describe "$NAME" --format='value(state.state)'
  on_all_workers "$(worker_command status "$NAME")"
  exit
fi
state=$(queued_state) || fail "gcloud could not look for $NAME; the lines above say why. Not logged in? gcloud auth login"
printf '%s %s\n' "$NAME" "$state"
[[ $state != ACTIVE ]] || worker_states
