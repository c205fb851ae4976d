"""Show what a batch really contains: python tools/inspect_data.py --config RECIPE [--html FILE | --png FILE]"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.inspection import run

if __name__ == "__main__":
    sys.exit(command(lambda: run(__doc__ or "", sys.argv[1:])))
