#!/usr/bin/env bash
# Asks for a TPU as a queued resource and waits until it is there: one slice, or several (--node-count) that train
# together over the data-centre network. Its settings are remembered for the other commands.
#
#   bash scripts/tpu_vm/create.sh --project my-project --zone us-east5-a --name glm45 --accelerator-type v5p-512
#   bash scripts/tpu_vm/create.sh --node-count 4 --capacity spot --valid-until-duration 6h     # the rest from ./tpu.env
#   bash scripts/tpu_vm/create.sh --no-wait && bash scripts/tpu_vm/status.sh
#
# flags:
#   --no-wait        return when the request is in the queue
#   --poll SECONDS   look so often while waiting, 30 by default
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The image that Google names for each accelerator.
default_runtime() {
  case ${ACCELERATOR_TYPE:-$TYPE} in
    v2* | v3* | v4*) echo tpu-ubuntu2204-base ;;
    v5litepod*) echo v2-alpha-tpuv5-lite ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    tpu7x*) fail "tpu7x is to be had on Kubernetes alone (GKE): see scripts/kubernetes/jobset_tpu.yaml" ;;
    *) fail "no runtime version is known for '${ACCELERATOR_TYPE:-$TYPE}'. Give --runtime-version" ;;
  esac
}

# The arguments of `queued-resources create`, into REQUEST.
make_request() {
  if [[ -n $ACCELERATOR_TYPE && -z $TYPE$TOPOLOGY ]]; then
    REQUEST=("--accelerator-type=$ACCELERATOR_TYPE")
  elif [[ -z $ACCELERATOR_TYPE && -n $TYPE && -n $TOPOLOGY ]]; then
    REQUEST=("--type=$TYPE" "--topology=$TOPOLOGY")
  else
    fail "what TPU? Give --accelerator-type (such as v5p-512), or else --type and --topology together"
  fi
  RUNTIME_VERSION=${RUNTIME_VERSION:-$(default_runtime)}
  REQUEST+=("--runtime-version=$RUNTIME_VERSION")
  if ((NODE_COUNT == 1)); then
    REQUEST+=("--node-id=$NAME")
  else
    REQUEST+=("--node-count=$NODE_COUNT" "--node-prefix=$NAME")
  fi
  [[ $CAPACITY == on-demand ]] || REQUEST+=("--$CAPACITY")
  [[ $SSH == external ]] || REQUEST+=(--internal-ips)
  local key flag
  for key in VALID_UNTIL_DURATION NETWORK SUBNETWORK SERVICE_ACCOUNT; do
    flag=${key,,}
    [[ -z ${!key} ]] || REQUEST+=("--${flag//_/-}=${!key}")
  done
}

wait_until_active() {
  local state="" before=""
  while [[ $state != ACTIVE ]]; do
    state=$(queued_state) || state="unknown (gcloud did not answer)"
    [[ $state == "$before" ]] || say "$(date +%T) $NAME is $state"
    before=$state
    case $state in
      ACTIVE) ;;
      FAILED | SUSPEND*) fail "$NAME is $state. 'gcloud compute tpus queued-resources describe $NAME --project=$PROJECT \
--zone=$ZONE' says why; then delete.sh, and create.sh again" ;;
      ABSENT) fail "$NAME is gone; somebody deleted it" ;;
      *) sleep "$poll" ;;
    esac
  done
}

wait=1 poll=30
while (($#)); do
  case $1 in
    --no-wait) wait=0 TAKEN=1 ;;
    --poll) poll=${2:?--poll needs seconds} TAKEN=2 ;;
    *) common_flag "$@" ;;
  esac
  shift "$TAKEN"
done
load_settings new
make_request

if ((!DRY_RUN)); then
  state=$(queued_state) || fail "gcloud could not look for $NAME; the lines above say why. Not logged in? gcloud auth login"
  [[ $state == ABSENT ]] ||
    fail "$NAME exists already and is $state. Go on with it (setup.sh, launch.sh, resume.sh), or delete.sh first"
fi
tpus queued-resources create "$NAME" "${REQUEST[@]}" --async --quiet ||
  fail "gcloud could not ask for $NAME; the lines above say why. Often it is quota (of spot and of on-demand apart), or \
an accelerator that $ZONE does not have"
remember_settings
if ((wait && !DRY_RUN)); then
  say "waiting for capacity; Ctrl-C leaves the request in the queue, status.sh shows it"
  wait_until_active
fi
