#!/usr/bin/env bash
# Stops the run in all workers: it saves a checkpoint and ends. The TPU stays (and costs); delete.sh gives it back.
# A resume.sh that watches the run ends too.
#
#   bash scripts/tpu_vm/stop.sh
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
  common_flag "$@"
  shift "$TAKEN"
done
load_settings
remember stopped "$(date)" # before the run ends, so that resume.sh does not take its end for a failure
on_all_workers "$(worker_command stop "$NAME")" ||
  fail "the run could not be stopped in every worker; status.sh shows more"
