"""Reading ahead of who consumes: a thread that is a few records in front, and memory that is used again."""

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from wtn_pretrain.device import device

S = TypeVar("S")
T = TypeVar("T")


def ahead(load: Callable[[S], T], sources: Iterable[S], depth: int) -> Iterator[T]:
    """`load` of each source in order, done by one thread that is at most `depth` ahead of who iterates.

    What `load` raises is raised when its turn comes. The thread ends with the iterator, even one that is dropped half-way.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for source in sources:
                waiting.append(pool.submit(load, source))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Buffers:
    """Memory to read into: fresh pages cost more than the read itself, so they are lent out again.

    A buffer comes back once no tensor holds it any more: views, what autograd keeps and what is being sent included.
    """

    def __init__(self) -> None:
        # what an accelerator copies from while the CPU goes on must be pinned; torch's own pool knows when such a copy is done
        self._pinned = device().type != "cpu"
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, size: int) -> Tensor:
        """Uint8 [size] on the CPU, of any contents."""
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(size, dtype=torch.uint8)
        # the array dies with the last tensor on it
        lent = memory.numpy()
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)
