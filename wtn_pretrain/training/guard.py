"""Guards a stage against divergence: steps that must not be taken are left out, alike on all ranks.

DeepSpeed leaves a step out by itself where its optimizer looks at the norm of the gradient: at ZeRO 1 to 3, and wherever weights are
rounded. At ZeRO 0 in fp32 it steps whatever comes, so there its optimizer is made to look too. A loss that is not finite makes the
gradient such, which the reduction over ranks carries to all of them; so the norm alone has to be looked at, and it is the same
everywhere.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.errors import UserError
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import gradient_norm
from wtn_pretrain.training.offending import name_samples
from wtn_pretrain.training.spikes import Jump, Spikes


def weighed(loss: Tensor) -> Tensor:
    """`loss` [], bit for bit and so is its gradient; where it is not finite, neither is the gradient, whatever led to it."""
    return loss * (1 + 0 * loss.detach())


class Buffers:
    """What a forward pass changes by itself, as it was when it was last kept: a step that is left out has to restore it."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        same: dict[torch.dtype, list[Tensor]] = {}
        for network in networks:
            for buffer in network.buffers():
                same.setdefault(buffer.dtype, []).append(buffer)
        # lists of one type are copied at once
        self._kept = [(buffers, [buffer.clone() for buffer in buffers]) for buffers in same.values()]

    @torch.no_grad()
    def keep(self) -> None:
        for buffers, kept in self._kept:
            torch._foreach_copy_(kept, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        for buffers, kept in self._kept:
            torch._foreach_copy_(buffers, kept)


class Wary:
    """Makes the optimizer of an engine at ZeRO 0 leave out a step whose gradient is not finite, and say so as those of ZeRO 1 to 3 do.

    The engine then counts it under `skipped_steps`, and `was_step_applied` is false. This reads one number a step from the device, as
    DeepSpeed does at the other stages: the host waits there for the backward pass and can be ahead of the device no further.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._plain = self._optimizer.step
        self.clips = engine.gradient_clipping() > 0
        self.norm: Tensor | float | None = None
        """Of the gradient that is about to be stepped; None: the step is not looked at, unless it is clipped."""
        self.finite: bool | None = None
        """Whether `norm` is, where that is known already: the device is not asked again."""
        self._optimizer.overflow = False
        self._optimizer.step = self._step
        if self.clips:
            engine.clip_fp32_gradients = self._clip

    def _clip(self) -> None:
        from deepspeed.runtime.utils import clip_grad_norm_

        engine = self._engine
        if isinstance(self.norm, Tensor):
            torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), engine.gradient_clipping(), self.norm)
            return
        # the one that DeepSpeed takes and drops: over all ranks, before clipping
        self.norm = clip_grad_norm_(parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)

    def _step(self, *arguments: Any) -> Any:
        norm, finite, self.norm, self.finite = self.norm, self.finite, None, None
        self._optimizer.overflow = norm is not None and not (math.isfinite(norm) if finite is None else finite)
        return None if self._optimizer.overflow else self._plain(*arguments)


class Guard:
    """What a stage does about steps that go wrong. Every rank must make one, and call its methods in the same order.

    As a part of a checkpoint it keeps which steps were left out, and with which batch of the data order a step is taken.
    """

    def __init__(self, engine: Any, network: nn.Module, section: TrainSection, stage: str, folder: Path, stream: BatchStream) -> None:
        """`network`: whose buffers a forward pass changes. `folder`: where the batches of bad steps are named."""
        self._engine, self._section, self._stage, self._folder, self._stream = engine, section, stage, folder, stream
        plain = engine.zero_optimization_stage() == 0 and not engine.fp16_enabled() and not engine.bfloat16_enabled()
        self._wary = Wary(engine) if plain else None
        self._buffers = Buffers([network])
        self._spikes = Spikes(section.spike)
        self.skipped = 0
        """Steps left out so far, those that fp16 leaves out to find its loss scale not among them."""
        self.in_a_row: list[int] = []
        """The steps, from 0, that were left out since the last one that was taken."""
        self._returns = 0
        self._further = 0

    # steps that are not finite

    def begin(self) -> None:
        """To be called before the forward passes of a step: keeps what they change."""
        self._buffers.keep()

    def look(self, wanted: bool) -> Tensor | float | None:
        """To be called between the last backward pass of a step and `engine.step`; the norm of the gradient if it is `wanted` and known
        by then."""
        alone = self._wary is not None and not self._wary.clips
        norm = gradient_norm(self._engine) if wanted or alone else None
        if self._wary is not None and alone:
            self._wary.norm = norm
        return norm if wanted else None

    def left_out(self, step: int, loss: Tensor) -> bool:
        """Whether step number `step` (from 0), that the engine has just been asked to take, was left out; nothing has changed then.

        `loss`: this rank's.

        Raises:
            UserError: too many in a row; names the file in which their batches stand.
        """
        if self._engine.was_step_applied():
            self.in_a_row.clear()
            return False
        self._buffers.restore()
        value = _mean(loss)
        if self._engine.fp16_enabled() and math.isfinite(value):
            # the scale was too large: fp16's own affair
            return True
        self.skipped += 1
        self.in_a_row.append(step)
        if len(self.in_a_row) > self._section.max_skipped:
            self._give_up(step, value)
        return True

    @property
    def overflows(self) -> int:
        """Steps that fp16 has left out to find its loss scale."""
        return self._engine.skipped_steps - self.skipped

    def _give_up(self, step: int, loss: float) -> None:
        stage, before = self._stage, len(self.in_a_row) - 1
        what = "the norm of the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        path = self.name_batches(step, what, self.in_a_row)
        row = f", after {before} steps in a row that were left out for that" if before else ""
        checkpoints = self._folder / "checkpoints"
        kept = f"the checkpoint before it is kept in {checkpoints}" if _holds_any(checkpoints) else "no checkpoint was written yet"
        raise UserError(
            f"{stage}: {what} at step {step + 1}{row}; the samples are named in {path}; look at them, or lower {stage}.optimizer.lr or "
            f"{stage}.clip under another --run.name ({kept})"
        )

    # losses that jump

    @property
    def listens(self) -> bool:
        """Whether `jumps` wants the loss of every step."""
        return self._section.spike > 0

    def jumps(self, loss: float) -> Jump | None:
        """Whether the loss of a step that was taken, the same on all ranks, is the first one of a spike."""
        return self._spikes.take(loss)

    @property
    def may_return(self) -> bool:
        """Whether the stage may go back to a checkpoint once more."""
        return self._returns < self._section.spike_rollbacks

    def returning(self, step: int, resume: Callable[[], tuple[int, float]]) -> int | None:
        """Goes back to the newest checkpoint by `resume`, after step number `step` (from 0), and past all batches since.

        Returns:
            The step to go on with; None where there was no checkpoint, and nothing has changed.
        """
        returns, further = self._returns + 1, self._further
        start, _ = resume()
        if start == 0:
            return None
        # what the checkpoint says of earlier returns may be older than what this run has done since
        self._returns, self._further = returns, further + step + 1 - start
        return start

    @property
    def returns(self) -> int:
        """How often the stage has gone back."""
        return self._returns

    def batch(self, step: int) -> int:
        """The number in the data order of the batch with which a step (both from 0) is taken."""
        return step + self._further

    # what is kept of it

    def name_batches(self, step: int, why: str, steps: Sequence[int]) -> Path:
        """Writes, on rank 0, which samples `steps` (from 0) were given, on all ranks together; where it stands."""
        batches = [(one + 1, self.batch(one)) for one in steps]
        writes = not dist.is_initialized() or dist.get_rank() == 0
        return name_samples(self._folder, self._stage, step + 1, why, batches, self._stream, writes)

    def state_dict(self) -> dict[str, Tensor]:
        """`counts` int64: skipped, returns, batches left out for them, whether in a spike, the steps left out in a row; `losses` float64:
        their number and they."""
        counts = [self.skipped, self._returns, self._further, int(self._spikes.within), *self.in_a_row]
        losses = self._spikes.losses
        return {"counts": torch.tensor(counts), "losses": torch.tensor([float(len(losses)), *losses], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        self.skipped, self._returns, self._further, within, *self.in_a_row = state["counts"].tolist()
        self._spikes.restore(state["losses"].tolist()[1:], bool(within))


def _mean(loss: Tensor) -> float:
    """The mean over all ranks, the same number on all of them."""
    value = loss.detach().float().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def _holds_any(checkpoints: Path) -> bool:
    return checkpoints.is_dir() and any(path.name.startswith("step") for path in checkpoints.iterdir())
