"""Say what is well and what is wrong on the machines at hand, with remedies: python tools/doctor.py, or under a launcher on all ranks.

    python tools/doctor.py [--folder runs] [--peer HOST[:PORT]] [--json]
    deepspeed --hostfile hosts tools/doctor.py            torchrun --nproc_per_node 8 tools/doctor.py            srun python tools/doctor.py

Exit status: 0, 1 where a fault was found (warnings are none), 2 for a mistake on the command line.
"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.doctor.command import run

if __name__ == "__main__":
    sys.exit(command(lambda: run(__doc__ or "", sys.argv[1:])))
