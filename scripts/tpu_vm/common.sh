# shellcheck shell=bash disable=SC2034 # what is only set here is used by the commands
# Sourced by the commands of this folder: settings out of flags and tpu.env, calls of gcloud that --dry-run prints
# instead, and what is remembered of a TPU between commands (its settings, how it was set up, what was launched).

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  printf 'error: bash 4.4 or newer is needed, this is %s. On macOS: brew install bash\n' "$BASH_VERSION" >&2
  exit 1
fi

TPU_VM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(cd "$TPU_VM/../.." && pwd)
REMOTE=glm45-jax # the checkout on a worker, below its home

SETTINGS="PROJECT ZONE NAME ACCELERATOR_TYPE TYPE TOPOLOGY RUNTIME_VERSION NODE_COUNT CAPACITY VALID_UNTIL_DURATION \
NETWORK SUBNETWORK SERVICE_ACCOUNT SSH"
declare -A FLAGS=() # settings given as flags
ENV_FILE=""         # given by --env-file
DRY_RUN=0
TAKEN=0 # arguments that common_flag took

# Values until something else is said.
PROJECT="" ZONE="" NAME="" ACCELERATOR_TYPE="" TYPE="" TOPOLOGY="" RUNTIME_VERSION="" NODE_COUNT=1
CAPACITY=on-demand VALID_UNTIL_DURATION="" NETWORK="" SUBNETWORK="" SERVICE_ACCOUNT="" SSH=external

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

say() {
  printf '%s\n' "$*" >&2
}

# --- settings -------------------------------------------------------------------------------------------------------

# The help of a command is the comment at its top, then the flags that all have.
usage() {
  awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
  cat <<'TEXT'

settings, as flags or as lines KEY=VALUE of ./tpu.env (scripts/tpu_vm/tpu.env.example explains them):
  --project ID               PROJECT                --zone ZONE            ZONE
  --name NAME                NAME: of the queued resource; its slices are NAME, or NAME-0, NAME-1, …
  --accelerator-type TYPE    ACCELERATOR_TYPE: v5p-512, v6e-256, …; or --type v4 --topology 4x4x8
  --runtime-version VERSION  RUNTIME_VERSION; by default what suits the accelerator
  --node-count N             NODE_COUNT: slices, 1 by default
  --capacity KIND            CAPACITY: on-demand (default), spot or reserved
  --valid-until-duration T   VALID_UNTIL_DURATION: give up waiting for capacity after T, such as 6h
  --network, --subnetwork, --service-account    as gcloud takes them
  --ssh WAY                  SSH: external (default), internal (from a VM of the same network) or iap
  --env-file FILE            in place of ./tpu.env
  --dry-run                  print the calls of gcloud and make none
  --help
TEXT
}

# Takes one setting or common flag off the arguments; TAKEN says how many they were.
common_flag() {
  local key value=${2-}
  TAKEN=2
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 TAKEN=1 && return ;;
    --*=*) value=${1#*=} TAKEN=1 ;;
    --*) (($# > 1)) || fail "$1 needs a value; --help lists the flags" ;;
    *) fail "'$1' is not understood here; --help lists what is" ;;
  esac
  key=${1%%=*} key=${key#--}
  if [[ $key == env-file ]]; then
    ENV_FILE=$value
    return
  fi
  key=${key//-/_} key=${key^^}
  is_setting "$key" || fail "unknown flag '${1%%=*}'; --help lists the flags"
  FLAGS[$key]=$value
}

is_setting() {
  [[ " $SETTINGS " == *" $1 "* ]]
}

# Reads lines KEY=VALUE. Nothing in them is executed.
read_env_file() {
  local file=$1 line key value number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^[[:space:]]*([A-Z_]+)=(.*)$ ]] || fail "$file:$number: expected KEY=VALUE, found '$line'"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    is_setting "$key" || fail "$file:$number: there is no setting '$key'; there are: $SETTINGS"
    value=${value%%[[:space:]]#*}
    value=${value%"${value##*[![:space:]]}"}
    [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]] && value=${BASH_REMATCH[1]}
    printf -v "$key" '%s' "$value"
  done <"$file"
}

apply_flags() {
  local key
  for key in "${!FLAGS[@]}"; do
    printf -v "$key" '%s' "${FLAGS[$key]}"
  done
}

# Settings in force: flags before what create.sh remembered of this TPU (unless `$1` is "new") before tpu.env.
load_settings() {
  if [[ -n $ENV_FILE ]]; then
    [[ -f $ENV_FILE ]] || fail "--env-file $ENV_FILE: no such file; copy scripts/tpu_vm/tpu.env.example"
    read_env_file "$ENV_FILE"
  elif [[ -f tpu.env ]]; then
    read_env_file tpu.env
  fi
  apply_flags
  [[ -n $PROJECT ]] || fail "no project. Give --project ID, or write PROJECT=ID into tpu.env"
  [[ -n $ZONE ]] || fail "no zone. Give --zone ZONE (such as us-east5-a), or write ZONE=ZONE into tpu.env"
  [[ -n $NAME ]] || fail "no name. Give --name NAME, or write NAME=NAME into tpu.env"
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "the name '$NAME' is not one for a TPU: lower-case letters, digits and hyphens, a letter first"
  STATE=${GLM45_TPU_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/glm45-tpu}/$PROJECT.$ZONE.$NAME
  if [[ ${1-} != new && -f $STATE/tpu.env ]]; then
    read_env_file "$STATE/tpu.env"
    apply_flags
  fi
  [[ $NODE_COUNT =~ ^[1-9][0-9]*$ ]] || fail "--node-count is '$NODE_COUNT', it must be a number of slices, 1 or more"
  [[ $CAPACITY =~ ^(on-demand|spot|reserved)$ ]] || fail "--capacity is '$CAPACITY'; it is on-demand, spot or reserved"
  [[ $SSH =~ ^(external|internal|iap)$ ]] || fail "--ssh is '$SSH'; it is external, internal or iap"
  ((DRY_RUN)) || command -v gcloud >/dev/null ||
    fail "gcloud is not on the PATH. Install it (https://cloud.google.com/sdk/docs/install), then: gcloud auth login"
}

# --- what is remembered of a TPU ------------------------------------------------------------------------------------

# Writes arguments to a file of STATE, beside and renamed. They may hold tokens: for the user's eyes only.
remember() {
  local file=$STATE/$1
  shift
  ((DRY_RUN)) && return
  (
    umask 077
    mkdir -p "$STATE"
    printf '%s\0' "$@" >"$file.partial"
  )
  mv "$file.partial" "$file"
}

remember_settings() {
  local key
  ((DRY_RUN)) && return
  mkdir -p "$STATE"
  for key in $SETTINGS; do
    printf '%s=%s\n' "$key" "${!key}"
  done >"$STATE/tpu.env.partial"
  mv "$STATE/tpu.env.partial" "$STATE/tpu.env"
}

# --- gcloud ---------------------------------------------------------------------------------------------------------

# gcloud compute tpus ARGUMENTS, in the project and zone; printed instead with --dry-run.
tpus() {
  run_gcloud compute tpus "$@"
}

run_gcloud() {
  local call=(gcloud "$@" --project="$PROJECT" --zone="$ZONE")
  if ((DRY_RUN)); then
    printf 'gcloud'
    printf ' %q' "${call[@]:1}"
    printf '\n'
    return
  fi
  "${call[@]}" </dev/null 8>&- # neither a loop's input nor the lock of resume.sh is for gcloud
}

# The slices' names, as gcloud makes them from --node-id and --node-prefix.
nodes() {
  local i
  if ((NODE_COUNT == 1)); then
    printf '%s\n' "$NAME"
    return
  fi
  for ((i = 0; i < NODE_COUNT; i++)); do
    printf '%s-%d\n' "$NAME" "$i"
  done
}

# State of the queued resource: ACTIVE, SUSPENDED, …, or ABSENT. Fails when it cannot be known.
queued_state() {
  tpu_state queued-resources "$NAME" 'value(state.state)'
}

# State of one slice: READY, PREEMPTED, …, or ABSENT.
node_state() {
  tpu_state tpu-vm "$1" 'value(state)'
}

tpu_state() {
  local out errors
  errors=$(mktemp)
  if out=$(tpus "$1" describe "$2" --format="$3" 2>"$errors"); then
    printf '%s\n' "${out:-UNKNOWN}"
  elif grep -qE 'NOT_FOUND|was not found' "$errors"; then
    printf 'ABSENT\n'
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

# tpu-vm ssh or scp, the way the setting SSH says. IAP is in the alpha track alone.
over_ssh() {
  local verb=$1
  shift
  case $SSH in
    external) tpus tpu-vm "$verb" "$@" --quiet ;;
    internal) tpus tpu-vm "$verb" "$@" --internal-ip --quiet ;;
    iap) run_gcloud alpha compute tpus tpu-vm "$verb" "$@" --tunnel-through-iap --quiet ;;
  esac
}

# Runs a command line in all workers of all slices, slices side by side; fails if it failed in any. By slice, since
# `queued-resources ssh --node=all` leaves a slice that it cannot reach out, and succeeds.
on_all_workers() {
  local command=$1
  each_node ssh --worker=all --command="$command"
}

# over_ssh VERB NODE ARGUMENTS for each slice; %NODE% in the arguments is its name.
each_node() {
  local verb=$1 node failed="" pid
  local -A pids=()
  shift
  for node in $(nodes); do
    if ((NODE_COUNT == 1 || DRY_RUN)); then
      one_node "$verb" "$node" "$@" || failed+=" $node"
    else
      one_node "$verb" "$node" "$@" &
      pids[$node]=$!
    fi
  done
  for node in "${!pids[@]}"; do
    pid=${pids[$node]}
    wait "$pid" || failed+=" $node"
  done
  [[ -z $failed ]] || {
    say "failed on:$failed (the lines above say why; several workers at once need the key in the agent:" \
      "ssh-add ~/.ssh/google_compute_engine)"
    return 1
  }
}

one_node() {
  local verb=$1 node=$2
  shift 2
  local arguments=("${@//%NODE%/$node}")
  if [[ $verb == ssh ]]; then
    over_ssh ssh "$node" "${arguments[@]}"
  else
    over_ssh "$verb" "${arguments[@]}"
  fi
}

# --- workers --------------------------------------------------------------------------------------------------------

# A command line for worker.sh that a shell reads as these arguments, whatever is in them.
worker_command() {
  printf 'bash %s/scripts/tpu_vm/worker.sh' "$REMOTE"
  printf ' %q' "$@"
}

# Does something with worker.sh where there is one, and something else where nothing is set up.
where_set_up() {
  printf 'if [ -f %s/.venv/.ready ]; then %s; else %s; fi' "$REMOTE" "$1" "$2"
}

# A line `glm45-worker HOST STATE` for each worker. Fails if one does not answer.
worker_states() {
  local out
  # shellcheck disable=SC2016 # the worker's name
  out=$(on_all_workers "$(where_set_up "$(worker_command status "$NAME")" 'echo glm45-worker $(hostname) not-set-up')") ||
    return 1
  grep '^glm45-worker ' <<<"$out" || {
    say "no worker told its state; gcloud said: $out"
    return 1
  }
}
