"""Stage 2 of which rank 1 never comes back from a teacher block, once it has a checkpoint behind it."""

import os
import time
from typing import Any

from wtn_pretrain.cli import main
from wtn_pretrain.imitation.units import Unit

CALLS = 60


def stuck(calls: int) -> None:
    """Makes the teacher of unit 2 hang at this call."""
    teach = Unit.teach
    made = 0

    def hanging(self: Unit, flow: Any) -> Any:
        nonlocal made
        made += self.index == 2
        while made > calls:
            time.sleep(1)
        return teach(self, flow)

    Unit.teach = hanging  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        stuck(CALLS)
    main(lambda stages: [stages.narrow(seed) for seed in stages.recipe.compare.seeds], __doc__)
