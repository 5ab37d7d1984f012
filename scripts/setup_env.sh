# shellcheck shell=bash
# Sourced by the other scripts: `setup_env EXTRA[,EXTRA…]` goes to the repository's root, makes .venv when there is
# none, and installs the project with those extras when pyproject.toml has changed since they were last installed.
# Needs Python 3.11 or newer and pip. PYTHON=/path/to/python chooses the interpreter of a new .venv.

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of 3.11 or newer."
    printf '%s\n' "$PYTHON"
    return
  fi
  # A name on PATH may be a shim for a version that is not there, so each is tried by running it.
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed and none was found. Install one, or name it: PYTHON=/path/to/python bash $0"
}

# Debian's python3 may come without ensurepip; a pip that stands outside can then put pip into .venv.
add_pip() {
  local python
  .venv/bin/python -m pip --version >/dev/null 2>&1 && return
  .venv/bin/python -m ensurepip --upgrade --default-pip >/dev/null 2>&1 && return
  python=$(find_python) || exit 1
  "$python" -m pip --python .venv/bin/python install --quiet pip && return
  fail "$python can make an environment but not put pip into it. On Debian or Ubuntu: apt install python3-venv (or python3-pip), then run this again."
}

make_venv() {
  local python
  python=$(find_python) || exit 1
  printf 'making .venv with %s (%s)\n' "$python" "$("$python" --version 2>&1)"
  "$python" -m venv --without-pip .venv ||
    fail "$python cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv, then run this again."
}

install_project() {
  local extras=$1 stamp sum
  stamp=".venv/.installed-${extras//,/-}"
  sum=$(cksum pyproject.toml scripts/constraints.txt)
  [[ -f $stamp && $(<"$stamp") == "$sum" ]] && return
  printf 'installing glm45-jax with the extras %s (a few minutes the first time)\n' "$extras"
  # The constraint holds whatever a dependency asks for: no other torch than the tested one comes in.
  .venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable ".[$extras]" ||
    fail "pip could not install the project; the lines above say why. Mended, run this again: it goes on from there."
  printf '%s\n' "$sum" >"$stamp"
}

setup_env() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
  if [[ ! -e .venv ]]; then
    make_venv
  elif ! is_new_enough .venv/bin/python; then
    fail "$PWD/.venv has no working Python 3.11 or newer. Remove that folder and run this again."
  fi
  add_pip
  install_project "$1"
}
