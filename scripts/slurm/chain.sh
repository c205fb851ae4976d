#!/usr/bin/env bash
# The whole method as a chain of jobs on Slurm, each of its own size: wide, imitate, finetune, then what is left (baseline, export, report).
#   bash scripts/slurm/chain.sh --config configs/cluster/resnet50-win.yaml [--section.key=value ...]
# SBATCH_* variables hold for all four jobs (sbatch(1), INPUT ENVIRONMENT VARIABLES). A stage that fails cancels those after it.
# python tools/submit.py CONFIG --chain does this with sizes from the configuration.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
before= jobs=()
for stage in wide imitate finetune method; do
  job=$(sbatch --parsable ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} "$here/$stage.sbatch" "$@") || {
    [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
    echo "error: $stage was refused${before:+; the jobs before it are cancelled again}" >&2
    exit 2
  }
  echo "$stage: job $job${before:+ after $before}"
  before=${job%%;*} jobs+=("${job%%;*}")
done
