#!/usr/bin/env bash
# Trains a small GLM-4.5 on this machine, converts it to Hugging Face's format and back, and talks with it: about
# 7 minutes on 2 cores (training: at most 6). Arguments go to `glm45 quickstart`.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env viz
exec .venv/bin/glm45 quickstart "$@"
