"""The one place that names an accelerator."""

import ctypes
import math
import os
import resource
from collections import deque
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


def supports_fp16() -> bool:
    """Whether the device computes in half precision, as DeepSpeed sees it."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the inputs of fp32 products to TensorFloat-32, of matrices and of convolutions alike (torch: the latter)."""
    if device().type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


# dense, from the vendors' data sheets, TFLOP/s: (bf16, fp16, tf32, fp32), None where the device has no such units; the first name that fits
_PEAKS: dict[str, tuple[float | None, float | None, float | None, float]] = {
    "GB200": (2500, 2500, 1250, 80),
    "B200": (2250, 2250, 1125, 75),
    "GH200": (989, 989, 494, 67),
    "H200 NVL": (835, 835, 418, 60),
    "H200": (989, 989, 494, 67),
    "H100 NVL": (835, 835, 418, 60),
    "H100 PCIe": (756, 756, 378, 51),
    "H100": (989, 989, 494, 67),
    "H800": (989, 989, 494, 67),
    "A100": (312, 312, 156, 19.5),
    "A800": (312, 312, 156, 19.5),
    "A40": (149.7, 149.7, 74.8, 37.4),
    "A30": (165, 165, 82, 10.3),
    "A10G": (70, 70, 35, 31.2),
    "A10": (125, 125, 62.5, 31.2),
    "L40S": (362, 362, 183, 91.6),
    "L40": (181, 181, 90.5, 90.5),
    "L4": (121, 121, 60, 30.3),
    "V100": (None, 125, None, 15.7),
    "T4": (None, 65, None, 8.1),
    "RTX 6000 Ada": (364, 364, 182, 91.1),
    "RTX A6000": (154.8, 154.8, 77.4, 38.7),
    "RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "RTX 3090": (71, 71, 35.6, 35.6),
    "MI300X": (1307, 1307, 654, 163.4),
    "MI250X": (191.5, 191.5, None, 47.9),
}


def peak_flops(precision: str) -> float | None:
    """Dense FLOP/s that the device promises for products of `precision` (bf16, fp16, tf32, fp32); None where nothing is known."""
    here = device()
    return known_peak(torch.cuda.get_device_name(here), precision) if here.type == "cuda" else None


def known_peak(name: str, precision: str) -> float | None:
    """`peak_flops` of a device by the name it gives itself, such as "NVIDIA A100-SXM4-80GB"."""
    words = f" {name.replace('-', ' ')} "
    peaks = next((peaks for key, peaks in _PEAKS.items() if f" {key} " in words), None)
    if peaks is None:
        return None
    peak = dict(zip(("bf16", "fp16", "tf32", "fp32"), peaks, strict=True))[precision]
    return None if peak is None else peak * 1e12


# mallopt's numbers of these settings (malloc.h of the GNU C library), and what the environment calls them
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees for its next step, where it computes on the CPU; whether that is so.

    The GNU C library gives the kernel back what lies free on top of its heap, and each step gets it again page by page, all zeroed: 5% of
    a ResNet-50's step. Tensors of up to 32 MiB now come from the heap, which is kept; larger ones still go back at once. The environment's
    own settings of an allocator win, and other C libraries are left as they are.
    """
    # tunables are also of the linker and of threads
    chosen = any(name in os.environ for name in _ALLOCATOR) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if device().type != "cpu" or chosen:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


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


class RunAhead:
    """Keeps the host at most so many steps ahead of the device. On the CPU it never is."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._marks: deque[torch.Event] = deque()

    def step(self) -> None:
        """To be called once a step: waits until the device has done what was asked of it so many calls ago."""
        if device().type == "cpu":
            return
        mark = torch.Event(device())
        mark.record()
        self._marks.append(mark)
        if len(self._marks) > self._steps:
            self._marks.popleft().synchronize()


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
