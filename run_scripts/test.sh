#!/usr/bin/env bash
# Installs what is missing and runs the tests; arguments go to pytest.
#
#   bash run_scripts/test.sh                  all tests
#   bash run_scripts/test.sh -m "not slow"    only those that start neither Ray, ranks and vLLM nor sandboxes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

prefer_cpu "the tests need no GPU"
ensure_environment
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
# tests/conftest.py keeps a module in one process, and so all tests that start Ray.
exec "$PY" -m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder "$@" </dev/null
