"""The one place that names an accelerator."""

import math
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def device() -> torch.device:
    """The device of this rank: its accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def backend() -> str:
    """The communication backend that belongs to the device."""
    return "nccl" if device().type == "cuda" else "gloo"


def hardware() -> str:
    """A short name of the machine, for tables and result files."""
    here = device()
    if here.type == "cuda":
        return torch.cuda.get_device_name(here)
    model = "CPU"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """Bytes: the most that the device has held for this process (on the CPU, its largest resident set)."""
    here = device()
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory() -> float:
    """Bytes of the device's own memory; infinite on the CPU, whose ranks share what there is."""
    here = device()
    return float(torch.cuda.get_device_properties(here).total_memory) if here.type == "cuda" else math.inf


def to_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    here = device()
    return {name: value.to(here, non_blocking=True) for name, value in batch.items()}


class SideStream:
    """Work beside the computation, such as copies between host and device. On the CPU everything is done when it returns."""

    def __init__(self) -> None:
        self.device = device()
        self._stream = None if self.device.type == "cpu" else torch.Stream(self.device)

    @property
    def pinned(self) -> bool:
        """Whether host memory should be page-locked, so that copies need not wait."""
        return self._stream is not None

    def mark(self) -> torch.Event | None:
        """The computation up to here, for `scope` to begin after."""
        return None if self._stream is None else torch.accelerator.current_stream().record_event()

    @contextmanager
    def scope(self, after: torch.Event | None = None) -> Iterator[None]:
        """What is queued within runs beside the computation, once that has reached `after`."""
        if self._stream is None:
            yield
            return
        with self._stream:
            if after is not None:
                self._stream.wait_event(after)
            yield

    def done(self) -> torch.Event | None:
        """What was queued in `scope` so far, for the computation to `wait` for."""
        return None if self._stream is None else self._stream.record_event()

    def synchronize(self) -> None:
        """Returns when all that was queued in `scope` has been done."""
        if self._stream is not None:
            self._stream.synchronize()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, to be read after `synchronize`; a tensor of the CPU is itself."""
        if self._stream is None:
            return tensor
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def wait(self, ready: torch.Event | None, tensors: Iterable[torch.Tensor]) -> None:
        """Lets the computation go on to `tensors` only when they are `ready`."""
        if ready is not None:
            stream = torch.accelerator.current_stream()
            stream.wait_event(ready)
            for tensor in tensors:
                # their memory must not go to others while the computation still reads it
                tensor.record_stream(stream)
