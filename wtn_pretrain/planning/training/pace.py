"""How long a step of a training stage takes, and what of it.

Computation comes from measured passes or from FLOPs over what a device reaches; messages cost latency and bytes over bandwidth (Thakur et
al. 2005: a ring for bytes, a tree for latency). What ZeRO sends is what DeepSpeed 0.19.8 does, which is more than the paper's counting
(Rajbhandari et al. 2020, section 7): stages 1 and 2 average gradients by an all-reduce and then gather weights, stage 3 gathers
weights twice a pass and scatters gradients. Stage 1 averages once a step, stages 2 and 3 after every pass.
"""

import math
from typing import NamedTuple

from wtn_pretrain.planning.cluster import Cluster, Link
from wtn_pretrain.planning.training.counted import Counted, count
from wtn_pretrain.planning.training.devices import Rates
from wtn_pretrain.planning.training.layout import Layout
from wtn_pretrain.planning.training.work import Work
from wtn_pretrain.training.optimizers import STATES


class Passes(NamedTuple):
    """Computation of one rank, in seconds."""

    forward_backward: float
    """Of one micro-batch, whatever is computed twice included."""
    step: float
    """Of clipping and the optimizer over all that the rank's tensor group holds, ZeRO undivided."""
    fixed: float = 0.0
    """Of a step, whatever there is to do."""


class Pace(NamedTuple):
    """Seconds of an optimizer step, by what they go into."""

    compute: float
    tensor: float
    """Messages between tensor ranks."""
    data: float
    """Messages between data ranks, as far as they are not hidden behind computation."""
    optimizer: float

    @property
    def step(self) -> float:
        return sum(self)


def declared(work: Work, layout: Layout, rates: Rates) -> Passes:
    """Passes from FLOPs: a backward pass costs twice a forward pass, and a block that is computed anew one forward pass more."""
    counts = work.flops()
    blocks, rest = sum(counts.blocks), counts.stem + counts.head
    times = 3 + (1 / layout.checkpoint if layout.checkpoint else 0)
    total = layout.micro * (times * blocks + 3 * rest) / layout.tensor
    starts = 3 * (len(counts.blocks) + 2) * rates.overhead
    held = work.parameters() / layout.tensor
    # the step reads weights, gradients and states, and writes all but the gradients
    moved = 4 * held * (3 + 2 * STATES[work.section.optimizer.name])
    return Passes(max(total / rates.flops, starts), moved / rates.bandwidth, rates.overhead)


def pace(work: Work, layout: Layout, passes: Passes, machines: Cluster, on: str, host: float = 50e9, exact: bool = True) -> Pace:
    """A step under a layout.

    Args:
        on: the kind of device; a CPU computes nothing while it sends.
        host: bytes a second between a device and host memory, for what is offloaded.
    """
    made = count(work, layout.micro, layout.tensor, layout.sequence, layout.checkpoint, on, exact)
    compute = layout.accumulation * passes.forward_backward
    near = machines.inside if layout.tensor <= machines.per_node else machines.between
    between_tensors = made.messages * (near.latency + machines.meeting)
    # what a collective over n ranks moves is (n - 1) / n of its bytes
    between_tensors += made.message_bytes / (near.bandwidth * machines.reduce) * (layout.tensor - 1) / layout.tensor
    sent, hidden = _data(work, layout, made, machines, on)
    backward = 2 / 3 * compute
    optimizer = passes.step / (layout.data if layout.zero else 1) + passes.fixed
    if layout.offload != "none" and on != "cpu":
        # gradients go to the host and weights come back; the optimizer steps there, at host memory's speed
        share = 4 * made.parameters / layout.data
        optimizer += 2 * share / host + share * (2 + 2 * STATES[work.section.optimizer.name]) / host
    return Pace(compute, layout.accumulation * between_tensors, sent - min(hidden, backward), optimizer)


def _data(work: Work, layout: Layout, made: Counted, machines: Cluster, on: str) -> tuple[float, float]:
    """Seconds that messages between data ranks take in a step, and those of them that run beside the backward pass."""
    if layout.data == 1:
        return 0.0, 0.0
    ranks, parameters = layout.data, made.parameters
    link, latency = _link(layout, machines, on)
    half = (ranks - 1) / ranks

    def collective(numbers: float, size: int, messages: float = 1) -> float:
        """One way: a gather or a scatter of so many numbers."""
        return half * numbers * size / (link.bandwidth * machines.reduce) + messages * (latency + machines.meeting)

    # gradients travel in the weights' type; autocast's in bfloat16 where ZeRO sends them
    size = 2 if work.section.precision == "bf16" and layout.zero else work.weight_bytes
    weight = work.weight_bytes
    messages = max(1, math.ceil(parameters / layout.bucket))
    if layout.zero == 0:
        sent = collective(2 * parameters, size, 2 * messages)
        hidden = 0.0
    elif layout.zero < 3:
        times = layout.accumulation if layout.zero == 2 else 1
        reduced = times * collective(2 * parameters, size, 2 * messages)
        sent = reduced + collective(parameters, weight, messages)
        # all buckets but the last can leave while the backward pass goes on
        hidden = reduced * max(0.0, 1 - layout.bucket / parameters) if layout.buffers > 1 else 0.0
    else:
        gathers = 2 * collective(parameters, weight, made.modules)
        sent = layout.accumulation * (gathers + collective(parameters, size, messages))
        # weights are brought together ahead of their use, but for the first and as far as that is allowed
        hidden = 0.5 * layout.accumulation * gathers
    sums = layout.accumulation * 2 * made.norms if work.section.batch_norms == "all" else min(1, made.norms)
    small = sums * (2 * latency + machines.meeting)
    return sent + small, 0.0 if on == "cpu" else hidden


def _link(layout: Layout, machines: Cluster, on: str) -> tuple[Link, float]:
    """What data ranks send over, and the seconds that a message takes to reach all of them.

    NCCL lays a ring through every adapter of a node (nccl-tests, PERFORMANCE.md: bus bandwidth), so what crosses nodes is shared among
    the data ranks of a node, as far as the links within it carry that.
    """
    hops = math.ceil(math.log2(layout.data))
    if layout.ranks <= machines.per_node:
        return machines.inside, hops * machines.inside.latency
    rings = 1 if on == "cpu" else max(1, machines.per_node // layout.tensor)
    bandwidth = min(rings * machines.between.bandwidth, max(machines.inside.bandwidth, machines.between.bandwidth))
    return Link(bandwidth, machines.between.latency), hops * machines.between.latency
