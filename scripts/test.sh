#!/usr/bin/env bash
# Sets up and passes the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
# tests use tiny networks and start ranks of their own: one thread each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# a file a worker at a time: what a module sets up is made once
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
