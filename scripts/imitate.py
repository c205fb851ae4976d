"""Stage 2: the thin network imitates the wide one, block by block, for every seed of the comparison.

python scripts/imitate.py --config configs/quickstart/bert.yaml
"""

from wtn_pretrain.cli import main

if __name__ == "__main__":
    main(lambda stages: [stages.narrow(seed) for seed in stages.recipe.compare.seeds], __doc__)
