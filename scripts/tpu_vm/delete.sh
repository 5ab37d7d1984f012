#!/usr/bin/env bash
# Gives the TPU back: deletes the queued resource and its slices, after asking, and forgets what was launched.
#
#   bash scripts/tpu_vm/delete.sh
#   bash scripts/tpu_vm/delete.sh --yes
#
# flags:
#   --yes    do not ask
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ask() {
  local answer
  [[ -t 0 ]] || fail "nobody is there to ask whether to delete $NAME. Give --yes"
  printf "Delete %s (%s slice(s) of %s, %s, %s), with the workers' disks? [y/N] " \
    "$NAME" "$NODE_COUNT" "${ACCELERATOR_TYPE:-$TYPE $TOPOLOGY}" "$PROJECT" "$ZONE" >&2
  read -r answer
  [[ $answer == [yY]* ]] || fail "nothing was deleted"
}

yes=0
while (($#)); do
  case $1 in
    --yes | -y) yes=1 TAKEN=1 ;;
    *) common_flag "$@" ;;
  esac
  shift "$TAKEN"
done
load_settings
((yes || DRY_RUN)) || ask
# First of all, so that a resume.sh that watches does not make it anew.
((DRY_RUN)) || rm -f "$STATE/launch"
tpus queued-resources delete "$NAME" --force --quiet ||
  fail "gcloud could not delete $NAME; the lines above say why. It may still cost: look again with status.sh"
((DRY_RUN)) || {
  rm -rf "$STATE"
  say "$NAME is deleted"
}
