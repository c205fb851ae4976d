"""Find the fastest plan of imitation for a number of ranks, and show what it will do: python tools/plan.py --config RECIPE --ranks N"""

import sys

from wtn_pretrain.errors import UserError
from wtn_pretrain.planning.command import run

if __name__ == "__main__":
    try:
        print(run(__doc__ or "", sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
