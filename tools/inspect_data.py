"""Show what a batch really contains: python tools/inspect_data.py --config RECIPE [--html FILE | --png FILE]"""

import sys

from wtn_pretrain.data.prepare.command import say
from wtn_pretrain.errors import UserError
from wtn_pretrain.inspection import run

if __name__ == "__main__":
    try:
        say(run(__doc__ or "", sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
