"""Read what the stages of a run have left, and say what is in it and whether it is whole: python tools/verify_checkpoint.py PATH

PATH is a checkpoint (stepN of a training stage, phaseP-stepN of imitation), a finished stage, or a folder above such, as a run's: then the
checkpoints and the finished networks of all its stages. Exit code: 0 all is whole, 1 something is not, 2 there is nothing.
"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.verify import main

if __name__ == "__main__":
    sys.exit(command(lambda: main(sys.argv[1:], __doc__)))
