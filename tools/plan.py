"""Find the fastest layout of a stage for a number of ranks, or the ranks it needs: python tools/plan.py --config RECIPE --ranks N

Stage 2 (narrow, the default) is planned as spans of blocks and their replicas; wide, finetune and scratch by ZeRO stage, tensor
parallelism, recomputation and micro-batch: python tools/plan.py --config RECIPE --stage wide --within 24h --device h100 [--ranks N]
"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.planning.dispatch import run

if __name__ == "__main__":
    sys.exit(command(lambda: run(__doc__ or "", sys.argv[1:])))
