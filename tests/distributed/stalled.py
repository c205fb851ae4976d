"""A script of the repository of which one rank never comes back from somewhere: stalled.py PLACE RANK --config FILE ...

PLACE: `open` (the data is opened), `data` (a batch of step 8 is made) or `network` (stage 1 writes its network). Every rank that comes
there writes a file `here-RANK` into the current folder.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from wtn_pretrain import stages
from wtn_pretrain.cli import main
from wtn_pretrain.data.stream import BatchStream


def stalls(place: str, rank: str) -> None:
    """Makes the rank stall."""
    owner, name = {"open": (stages, "open_task"), "data": (BatchStream, "micro_batch"), "network": (stages, "save_network")}[place]
    plain = getattr(owner, name)

    def stall(*arguments: Any) -> Any:
        if place != "data" or arguments[1] == 7:
            Path(f"here-{os.environ['RANK']}").touch()
            while os.environ["RANK"] == rank:
                time.sleep(1)
        return plain(*arguments)

    setattr(owner, name, stall)


if __name__ == "__main__":
    stalls(*sys.argv[1:3])
    main(lambda stages: stages.wide(), __doc__, sys.argv[3:])
