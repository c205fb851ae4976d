"""Bytes that a rank of a training stage holds, by what they are for.

What ZeRO divides is Rajbhandari et al. 2020, section 5: of P weights, 4P bytes of masters and 4P of each state over the data ranks from
stage 1 on, gradients from stage 2, weights from stage 3. What activations take under recomputation, tensor and sequence parallelism
(Korthikanti et al. 2022) is not a formula here: a pass of the network itself is counted (`counted`). On top of that come DeepSpeed's own
buffers, as version 0.19.8 allocates them: buckets of gradients, flat copies for messages, weights that ZeRO 3 brings together ahead.
"""

from typing import NamedTuple

from wtn_pretrain.planning.training.counted import Counted, count
from wtn_pretrain.planning.training.layout import Layout
from wtn_pretrain.planning.training.work import Work
from wtn_pretrain.training.optimizers import STATES


class Memory(NamedTuple):
    """Bytes of one rank."""

    base: int
    """The process before any network is built."""
    weights: int
    """Weights, buffers, and the fp32 masters that ZeRO steps."""
    optimizer: int
    """States."""
    gradients: int
    """Gradients that stay, and the buckets that they are sent in."""
    work: int
    """What a pass makes at most, beside those."""
    host: int = 0
    """Of what is offloaded: in host memory, and not on the device."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.base + self.weights + self.optimizer + self.gradients + self.work


def memory(work: Work, layout: Layout, on: str, base: int = 0, slack: float = 0.0, exact: bool = True) -> Memory:
    """What a rank holds at most.

    Args:
        on: the kind of device; on a CPU, what is offloaded stays where it is, and pages that nothing was written to take no memory.
        slack: see `Cluster.slack`.
        exact: see `count`.
    """
    made = count(work, layout.micro, layout.tensor, layout.sequence, layout.checkpoint, on, exact)
    data, zero, here = layout.data, layout.zero, on == "cpu"
    whole = made.parameters * work.weight_bytes
    master, share = 4 * made.parameters, -(-4 * made.parameters // data)
    states = STATES[work.section.optimizer.name] * (master if zero == 0 else share)
    held = whole // data if zero == 3 else whole
    masters = share if zero else 0
    peak, stays = _passes(made, layout, whole, share, here)
    weights, host = held + made.buffers + masters, 0
    if layout.offload != "none":
        # gradients of a rank's share go there as well, and a copy of the weights in the network's type
        host = states + masters + share + whole // data
        weights, states, host = (weights + share + whole // data, states, 0) if here else (weights - masters, 0, host)
        if layout.offload == "both" and not here:
            weights, host = weights - held, host + held
    return Memory(base, weights, states, stays, round(peak * (1 + slack)), host)


def _passes(made: Counted, layout: Layout, whole: int, share: int, here: bool) -> tuple[int, int]:
    """The most that is made at once in a step, and what stays between its passes: gradients and buckets."""
    zero, data = layout.zero, layout.data
    size = whole // made.parameters
    again = layout.accumulation > 1
    full = layout.bucket * size
    if zero == 0:
        # DeepSpeed's message is a flat copy of all gradients
        flat = min(whole, full) if data > 1 else 0
        if again:
            return max(made.lean, flat), whole
        return max(made.kept, whole + flat), 0
    part = whole // data
    if zero == 1:
        # gradients move into the bucket after the last pass, and this rank's out of it again
        moved = (min(whole, full) - whole if here else full) + part
        if again:
            return max(made.lean + (0 if here else full), moved + made.largest * size, part + share), whole
        return max(made.kept + (0 if here else full), whole + moved + made.largest * size), 0
    buckets = (1 if here and whole <= full else layout.buffers) * min(full, whole if here else full)
    kept = part if again else 0
    if zero == 2:
        if here and whole <= full:
            # of an empty bucket only what was written to is there, and gradients move into it as they come
            return max(made.kept, whole + part, part + share), kept
        return max(made.lean + part, share) + buckets, kept
    # Gradients of this rank's share always stay, and so does the one bucket, on a CPU as far as it was ever written to. Weights that will
    # be asked for again stay as well, up to a limit, and the message that they were cut out of until the last of them is asked for.
    near = min(whole, layout.live * size) + min(whole, layout.prefetch * size)
    return max(made.lean + near + (min(whole, full) if here else full), share), part
