#!/usr/bin/env bash
# Follows the log of one worker, the first of the first slice unless said. Ctrl-C ends the following, not the run.
#
#   bash scripts/tpu_vm/logs.sh
#   bash scripts/tpu_vm/logs.sh --node 1 --worker 3 --lines 500
#   bash scripts/tpu_vm/logs.sh --no-follow > glm45.log
#
# flags:
#   --node N      slice, 0 by default
#   --worker N    worker of the slice, 0 by default
#   --lines N     so many of the last lines first, 100 by default
#   --no-follow   print them and end
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

node=0 worker=0 lines=100 follow=-F
while (($#)); do
  case $1 in
    --node | --worker | --lines)
      [[ ${2-} =~ ^[0-9]+$ ]] || fail "$1 needs a number, found '${2-}'"
      printf -v "${1#--}" '%s' "$2"
      TAKEN=2
      ;;
    --no-follow) follow="" TAKEN=1 ;;
    *) common_flag "$@" ;;
  esac
  shift "$TAKEN"
done
load_settings
((node < NODE_COUNT)) || fail "--node is $node, but $NAME has $NODE_COUNT slice(s), counted from 0"

mapfile -t names < <(nodes)
over_ssh ssh "${names[node]}" --worker="$worker" --command="tail -n $lines $follow glm45-runs/$NAME/log" ||
  fail "no log from worker $worker of ${names[node]}. Nothing launched yet? status.sh shows what the workers do"
