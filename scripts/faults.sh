#!/usr/bin/env bash
# Faults on purpose: kills ranks over and over, fills and breaks disks, makes clocks jump; says what came of it.
#   bash scripts/faults.sh [--kills 100] [--seed 0] [--json FILE]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
# tiny networks and ranks of their own: one thread each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m tests.faults "$@"
