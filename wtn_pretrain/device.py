"""The one place that names an accelerator."""

import resource

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


def to_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    here = device()
    return {name: value.to(here, non_blocking=True) for name, value in batch.items()}
