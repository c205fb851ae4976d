"""Batches brought to the device while the step before them is computed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from wtn_pretrain.data.stream import Batch
from wtn_pretrain.device import SideStream

_DEPTH = 2
"""Steps that are prepared in front of the one that is computed."""


def on_device(steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
    """The micro-batches of each step on this rank's device, in order.

    On an accelerator a thread takes them from `steps`, puts them into page-locked memory and copies them on a stream of its own, two
    steps ahead, so that neither the copy nor what makes the batches holds up the computation. On the CPU they pass as they are.
    What `steps` raises is raised at its turn.
    """
    side = SideStream()
    if not side.pinned:
        yield from steps
        return
    source = iter(steps)

    def bring() -> tuple[list[Batch], Any] | None:
        batches = next(source, None)
        if batches is None:
            return None
        with side.scope():
            moved = [{name: side.to_device(value.pin_memory()) for name, value in batch.items()} for batch in batches]
        return moved, side.done()

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque[Future[tuple[list[Batch], Any] | None]] = deque(pool.submit(bring) for _ in range(_DEPTH))
        try:
            while (brought := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(bring))
                batches, ready = brought
                side.wait(ready, (value for batch in batches for value in batch.values()))
                yield batches
        finally:
            pool.shutdown(cancel_futures=True)
