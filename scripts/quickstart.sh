#!/usr/bin/env bash
# The whole method on this machine, from nothing: environment, wide network, imitation, fine-tuning, the same network from scratch,
# export and report, for a ResNet on scikit-learn's digits and a BERT on the prose of Python's documentation. Started again, it goes on.
#   bash scripts/quickstart.sh [--section.key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
export PYTHONUNBUFFERED=1
out=runs/quickstart

# the networks are too small to share between cores: one core each, side by side
train() {
  OMP_NUM_THREADS=1 "$PYTHON" scripts/run.py --config "configs/quickstart/$1.yaml" --run.folder="$out" --run.name="$1" "${@:2}" 2>&1 | sed -u "s/^/[$1] /"
}
train resnet "$@" & resnet=$!
train bert "$@" & bert=$!
trap 'kill $resnet $bert 2>/dev/null || true' INT TERM
code=0
wait $resnet || code=$?
wait $bert || code=$?
[ $code -eq 0 ] || { echo "error: a run ended with exit code $code; the lines above say why" >&2; exit $code; }
echo
"$PYTHON" tools/report.py "$out"
