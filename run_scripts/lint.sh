#!/usr/bin/env bash
# Installs what is missing and checks the code's style; the settings stand in pyproject.toml.
#
#   bash run_scripts/lint.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

prefer_cpu "the checks need no GPU"
ensure_environment
"$PY" -m ruff check .
"$PY" -m ruff format --check .
