#!/usr/bin/env bash
# Sets up and passes the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
# tests use tiny networks and start ranks of their own: one thread each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# a worker more than cores: ranks that wait for one another leave them idle
workers=$(($(env -u OMP_NUM_THREADS nproc) + 1))
# a file a worker at a time: what a module sets up is made once
exec "$PYTHON" -m pytest -n "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder "$@"
