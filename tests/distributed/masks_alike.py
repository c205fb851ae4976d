"""Stage 1 in one process with the dropout of N tensor-parallel ranks: masks_alike.py N whole|parts --config FILE ..."""

import sys
from typing import Any

from tests.distributed.divided import draw_alike
from wtn_pretrain.cli import main
from wtn_pretrain.training import loop

if __name__ == "__main__":
    ranks, positions, *rest = sys.argv[1:]
    plain = loop.TaskModule

    def alike(network: Any, task: Any) -> Any:
        draw_alike(network, int(ranks), positions == "parts")
        return plain(network, task)

    loop.TaskModule = alike  # type: ignore[assignment, misc]
    main(lambda stages: stages.wide(), __doc__, rest)
