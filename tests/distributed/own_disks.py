"""Stage 1 of which every rank has a disk of its own, in the place where the others have theirs: own_disks.py --config FILE ..."""

import os
import sys
from pathlib import Path

from wtn_pretrain.cli import main
from wtn_pretrain.parallel import shared_folder

if __name__ == "__main__":
    shared_folder.SECONDS = 1.0
    here = Path(f"host-{os.environ['RANK']}")
    here.mkdir()
    os.chdir(here)
    main(lambda stages: stages.wide(), __doc__, sys.argv[1:])
