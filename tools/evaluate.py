"""Evaluate every finished network of a run on the validation data: python tools/evaluate.py --config runs/NAME/config.yaml"""

from wtn_pretrain.cli import main
from wtn_pretrain.method import evaluate_run

if __name__ == "__main__":
    main(evaluate_run, __doc__)
