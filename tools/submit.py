"""Submit a run to Slurm and follow it: nodes, ranks, memory and time from its configuration and plan.

python tools/submit.py configs/cluster/resnet50-win.yaml --nodes 2 --dry-run
python tools/submit.py configs/cluster/resnet50-win.yaml --chain --nodes 2 --option partition=gpu
python tools/submit.py configs/cluster/resnet50-win.yaml --vary wide.optimizer.lr=0.1,0.2 --vary run.seed=0,1
"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.slurm.command import run

if __name__ == "__main__":
    sys.exit(command(lambda: run(__doc__ or "", sys.argv[1:])))
