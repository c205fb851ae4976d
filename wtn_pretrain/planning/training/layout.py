"""How a training stage lies on its ranks."""

from typing import Any, NamedTuple

from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import read_deepspeed_json
from wtn_pretrain.training.offload import PARAMETERS, offloads


class Layout(NamedTuple):
    """Ranks, what each of them holds, and how many samples it takes at once."""

    ranks: int
    zero: int = 0
    tensor: int = 1
    """Ranks among which every layer is divided."""
    sequence: bool = False
    """Whether they divide positions too."""
    micro: int = 1
    """Samples that a rank (its tensor group) takes in one pass."""
    accumulation: int = 1
    """Passes of an optimizer step."""
    checkpoint: int = 0
    """Every so many-th block computes its activations anew; 0: none."""
    offload: str = "none"
    """What is kept in host memory: none, optimizer, or both (weights as well, ZeRO 3)."""
    bucket: int = 500_000_000
    """Gradients (numbers) that DeepSpeed brings together for one message: its reduce_bucket_size."""
    buffers: int = 1
    """Such buckets at a time: two with overlap_comm."""
    prefetch: int = 50_000_000
    """Weights (numbers) that ZeRO 3 brings together ahead: its stage3_prefetch_bucket_size."""

    live: int = 1_000_000_000
    """Weights (numbers) that ZeRO 3 keeps whole as long as they will be asked for again: its stage3_max_live_parameters."""

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.ranks // self.tensor

    def file(self) -> str:
        """The shipped DeepSpeed file that gives this."""
        kept = {"none": "", "optimizer": "_offload", "both": "_offload"}[self.offload]
        return f"ds_configs/zero{self.zero}{kept}.json"

    def __str__(self) -> str:
        parts = [f"ZeRO {self.zero}"]
        if self.offload != "none":
            parts.append({"optimizer": "optimizer in host memory", "both": "weights and optimizer in host memory"}[self.offload])
        if self.tensor > 1:
            parts.append(f"tensor {self.tensor}" + (" with sequence" if self.sequence else ""))
        if self.checkpoint:
            parts.append("recompute" if self.checkpoint == 1 else f"recompute every {self.checkpoint}")
        parts.append(f"{self.micro} x {self.accumulation}")
        return ", ".join(parts)


def layout_of(section: TrainSection, stage: str, ranks: int) -> Layout:
    """What a section asks for on so many ranks.

    Raises:
        ValueError: the batch or the tensor ranks do not fit them.
    """
    if ranks % section.tensor_parallel:
        raise ValueError(f"{stage}.tensor_parallel {section.tensor_parallel} does not divide {ranks} ranks")
    data = ranks // section.tensor_parallel
    micro = section.micro_batch_size or section.batch_size // data
    if not micro or section.batch_size % (micro * data):
        raise ValueError(f"{stage}.batch_size {section.batch_size} is not a multiple of {micro or 1} samples on {data} data ranks")
    zero: dict[str, Any] = read_deepspeed_json(section.deepspeed, stage).get("zero_optimization", {})
    level = int(zero.get("stage", 0))
    overlapping = zero.get("overlap_comm", level == 3)
    return Layout(
        ranks=ranks,
        zero=level,
        tensor=section.tensor_parallel,
        sequence=section.sequence_parallel,
        micro=micro,
        accumulation=section.batch_size // (micro * data),
        checkpoint=int(section.checkpoint_activations),
        offload="both" if offloads(zero, PARAMETERS) else "optimizer" if offloads(zero) else "none",
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        buffers=2 if overlapping and level else 1,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", zero.get("prefetch_bucket_size", 5e7))),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
    )
