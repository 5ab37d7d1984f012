#!/usr/bin/env bash
# Runs the tests; arguments go to pytest (`bash scripts/test.sh -m "not slow"`, `bash scripts/test.sh tests/model -k mtp`).
# Files of tests run side by side, on up to four cores; `-n 0` runs them one after another. A process that dies ends the
# run, whose other processes would wait for its tests.
# PARITY=1 also installs torch and transformers and runs the live comparisons with them.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

extras="test,aot" # aot: the compilers for TPUs and GPUs, which need no such device
if [[ ${PARITY:-0} == 1 ]]; then
  extras="test,aot,parity"
fi
setup_env "$extras"
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile "$@"
