"""Stage 3: train the thin network that stage 2 warmed up, for every seed of the comparison.

python scripts/finetune.py --config configs/quickstart/bert.yaml
deepspeed --num_accelerators 2 scripts/finetune.py --config configs/quickstart/bert.yaml --run.name=two-ranks
"""

from wtn_pretrain.cli import main

if __name__ == "__main__":
    main(lambda stages: [stages.finetune(seed) for seed in stages.recipe.compare.seeds], __doc__)
