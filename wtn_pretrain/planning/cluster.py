"""The machines a plan is for: ranks, nodes, links and memory, declared or measured."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist

from wtn_pretrain.device import device


class Link(NamedTuple):
    """A connection that one rank has to others."""

    bandwidth: float
    """Bytes a second, each way at once."""
    latency: float
    """Seconds a message takes beside its bytes."""

    def seconds(self, size: np.ndarray | float) -> np.ndarray | float:
        return self.latency + size / self.bandwidth


class Cluster(NamedTuple):
    """`ranks` in order on nodes of `per_node`; every rank has its own links, which carry beside its computation."""

    ranks: int
    per_node: int
    inside: Link
    """Between ranks of one node."""
    between: Link
    """Between ranks of different nodes."""
    memory: float = math.inf
    """Bytes a rank may hold."""
    base: int = 0
    """Bytes that a process holds before any network is built."""
    reduce: float = 1.0
    """Bandwidth of an all-reduce as a share of the link's (on the CPU summing takes time of its own)."""
    meeting: float = 0.0
    """Seconds that ranks at work lose where they meet for a small sum, beside the latency: to be woken, and until the last has come."""
    hidden: float = 1.0
    """Share of a relay that costs the computation nothing; on the CPU, copying takes some of it."""
    slack: float = 0.0
    """What the allocator holds beside the memory of the unit at work, as a share of it; a heap of the CPU breaks into pieces."""

    def all_reduce(self, size: np.ndarray | float, replicas: np.ndarray, crosses: bool) -> np.ndarray:
        """Seconds of a ring over `replicas` ranks for `size` bytes on each; slow where it crosses nodes."""
        link = self.between if crosses else self.inside
        return 2 * (replicas - 1) * (size / replicas / (link.bandwidth * self.reduce) + link.latency)

    def node(self, rank: int) -> int:
        return rank // self.per_node

    def sized(self, ranks: int) -> Self:
        """The same machines, `ranks` of them."""
        return self._replace(ranks=ranks)


def data_centre(ranks: int) -> Cluster:
    """Accelerators on nodes of 8: 200 GB/s and 5 us within, 25 GB/s and 10 us between nodes; 80 GB, 1 GB of it the process's own."""
    return Cluster(ranks, 8, Link(200e9, 5e-6), Link(25e9, 1e-5), memory=80e9, base=1_000_000_000)


def cores(ranks: int) -> Cluster:
    """Cores of one machine over gloo: 1 GB/s, 0.1 ms and 1 ms to meet, no limit of memory, 0.5 GB the process's own."""
    link = Link(1e9, 1e-4)
    return Cluster(ranks, ranks, link, link, base=500_000_000, reduce=0.5, meeting=1e-3, hidden=0.5, slack=1.2)


def usual(ranks: int) -> Cluster:
    """What is assumed where nothing is declared, by this kind of device."""
    return (cores if device().type == "cpu" else data_centre)(ranks)


class Connection(NamedTuple):
    """What is measured of the links between ranks; see `Cluster`."""

    link: Link
    reduce: float
    meeting: float

    def of(self, cluster: Cluster) -> Cluster:
        """`cluster` with these links everywhere."""
        return cluster._replace(inside=self.link, between=self.link, reduce=self.reduce, meeting=self.meeting)


def measure_link(size: int = 1 << 24, repeats: int = 5) -> Connection:
    """The link between ranks 0 and 1 of the running process group, the all-reduce's share of its bandwidth, and what meeting costs.

    Every rank calls it and gets the same answer; two sizes tell bandwidth from latency, the fastest of `repeats` counts.
    """
    here = _here()
    bandwidth, small = measure_pair(1, size, repeats)
    tensor = torch.zeros(size // 4, device=here)
    together = _timed(lambda: dist.all_reduce(tensor), repeats)
    ranks = dist.get_world_size()
    share = 2 * (ranks - 1) / ranks * size / bandwidth / max(together - 2 * (ranks - 1) * small, together / 2)
    meeting = _meeting(here, 10 * repeats) - 2 * (ranks - 1) * small
    answer = torch.tensor([bandwidth, small, share, max(meeting, 0.0)], dtype=torch.float64, device=here)
    dist.broadcast(answer, 0)
    bandwidth, small, share, meeting = answer.tolist()
    return Connection(Link(bandwidth, small), share, meeting)


def measure_pair(other: int, size: int = 1 << 24, repeats: int = 5) -> Link:
    """The link between rank 0 and rank `other`; every rank calls it and gets the same answer."""
    here, rank = _here(), dist.get_rank()

    def there_and_back(count: int, times: int) -> float:
        tensor = torch.zeros(count, dtype=torch.uint8, device=here)

        def once() -> None:
            if rank == 0:
                dist.send(tensor, other)
                dist.recv(tensor, other)
            elif rank == other:
                dist.recv(tensor, 0)
                dist.send(tensor, 0)

        return _timed(once, times) / 2

    small, large = there_and_back(1, 10 * repeats), there_and_back(size, repeats)
    # on a machine that others use, a byte may have taken as long as many
    answer = torch.tensor([size / max(large - small, large / 2), small], dtype=torch.float64, device=here)
    dist.broadcast(answer, 0)
    return Link(*answer.tolist())


def _here() -> torch.device:
    """Where messages of the running process group lie."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else device()


def _meeting(here: torch.device, times: int) -> float:
    """Seconds of a small sum between two pieces of work of a millisecond or so, the mean."""
    matrix = torch.full((384, 384), 1e-3, device=here)
    few = torch.zeros(64, device=here)
    spent = 0.0
    for _ in range(times):
        for _ in range(4):
            matrix @ matrix
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        began = time.perf_counter()
        dist.all_reduce(few)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        spent += time.perf_counter() - began
    return spent / times


def _timed(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
