"""The whole method: wide, narrow, finetune, the same thin network from scratch, export and report. Started again, it continues.

python scripts/run.py --config configs/quickstart/resnet.yaml
"""

from wtn_pretrain.cli import main
from wtn_pretrain.method import run_method

if __name__ == "__main__":
    main(run_method, __doc__)
