"""Stage 1: train the wide network on DeepSpeed.

python scripts/train_wide.py --config configs/quickstart/bert.yaml
deepspeed --num_accelerators 2 scripts/train_wide.py --config configs/quickstart/bert.yaml --run.name=two-ranks
"""

from wtn_pretrain.cli import main

if __name__ == "__main__":
    main(lambda stages: stages.wide(), __doc__)
