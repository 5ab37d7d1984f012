#!/usr/bin/env bash
# Installs the project in all workers of all slices, in ~/glm45-jax: this checkout as it is here (what git does not
# ignore), or a commit of a repository. Needs a TPU that is ACTIVE, with no run on it. Run again after a change; what is
# installed stays.
#
#   bash scripts/tpu_vm/setup.sh
#   bash scripts/tpu_vm/setup.sh --git https://github.com/me/glm45-jax --ref my-branch
#   bash scripts/tpu_vm/setup.sh --extras tpu,data,viz
#
# flags:
#   --git URL        clone this on the workers in place of copying the checkout
#   --ref REF        the branch, tag or commit of it, main by default
#   --extras NAMES   of pyproject.toml, "tpu,data" by default
set -euo pipefail
# shellcheck source=scripts/tpu_vm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# All but the environment and the runs' folders is replaced, so that no file that is gone here stays there. Until the end
# the worker counts as not set up.
clear_remote="mkdir -p $REMOTE && rm -f $REMOTE/.venv/.ready && find $REMOTE -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +"

copy_checkout() {
  local folder=. archive="$REMOTE.tar.gz"
  if ((!DRY_RUN)); then
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder's name now
    trap "rm -rf '$folder'" EXIT
    pack_checkout "$folder/$archive"
  fi
  each_node scp "$folder/$archive" "%NODE%:" --worker=all || fail "the checkout did not reach every worker"
  on_all_workers "$clear_remote && tar -xzf $archive -C $REMOTE" || fail "the checkout was not unpacked in every worker"
}

pack_checkout() {
  git -C "$CHECKOUT" rev-parse --is-inside-work-tree >/dev/null 2>&1 ||
    fail "$CHECKOUT is no git checkout, so what to copy is not known. Give --git URL"
  # A file that is deleted here but not yet in git is listed by it, and tar would stop at it.
  git -C "$CHECKOUT" ls-files -z --cached --others --exclude-standard |
    (cd "$CHECKOUT" && while IFS= read -r -d '' file; do
      [[ ! -e $file ]] || printf '%s\0' "$file"
    done) |
    tar -C "$CHECKOUT" --null -T - -czf "$1"
}

clone() {
  local quoted_url quoted_ref
  printf -v quoted_url '%q' "$git"
  printf -v quoted_ref '%q' "$ref"
  on_all_workers "$clear_remote && cd $REMOTE && git init -q && git fetch -q --depth 1 $quoted_url $quoted_ref \
&& git checkout -q FETCH_HEAD" ||
    fail "$git at $ref was not cloned in every worker; a private repository needs a token in the URL"
}

# Modules that a run has yet to import would change under it.
check_idle() {
  local states
  states=$(worker_states) || fail "not every worker answers; is $NAME ACTIVE? status.sh shows it"
  ! grep -q ' running$' <<<"$states" || fail "a run is at work on $NAME. Stop it with stop.sh, or wait for its end"
}

git="" ref=main extras=tpu,data
while (($#)); do
  case $1 in
    --git) git=${2:?--git needs a URL} TAKEN=2 ;;
    --ref) ref=${2:?--ref needs a name} TAKEN=2 ;;
    --extras) extras=${2:?--extras needs names} TAKEN=2 ;;
    *) common_flag "$@" ;;
  esac
  shift "$TAKEN"
done
load_settings
[[ $extras =~ ^[a-z,]+$ ]] || fail "--extras is '$extras'; it is names of pyproject.toml with commas, such as tpu,data"

((DRY_RUN)) || check_idle
if [[ -n $git ]]; then
  clone
else
  copy_checkout
fi
on_all_workers "$(worker_command install "$extras")" ||
  fail "the project was not installed in every worker. Mended, run setup.sh again: it goes on from there"
if [[ -n $git ]]; then
  remember setup --extras "$extras" --git "$git" --ref "$ref"
else
  remember setup --extras "$extras"
fi
((DRY_RUN)) || say "$NAME is set up; next: launch.sh CONFIG"
