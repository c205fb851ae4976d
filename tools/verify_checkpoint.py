"""Read checkpoints of a training stage whole, and say what is in them: python tools/verify_checkpoint.py PATH

PATH is a checkpoint (stepN), or a folder above checkpoints, such as a run's. Exit code: 0 all are whole, 1 one is not, 2 there is none.
"""

import sys
from pathlib import Path

from wtn_pretrain.errors import UserError
from wtn_pretrain.training.checkpoint.contents import contents, find_checkpoints, shown
from wtn_pretrain.training.checkpoint.manifest import DamagedError


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        found = find_checkpoints(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = 0
    for folder in found:
        try:
            print(shown(folder, *contents(folder)))
        except DamagedError as error:
            print(f"error: {error}; the checkpoint is damaged", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
