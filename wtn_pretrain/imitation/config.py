"""The keys of stage 2."""

from typing import Literal, Self

from pydantic import Field, model_validator

from wtn_pretrain.config import Section
from wtn_pretrain.training.config import OptimizerSection, ScheduleSection


class MobileBertLoss(Section):
    """Weights of MobileBERT's per-layer terms (Sun et al. 2020, in the form of its TF2 code)."""

    hidden: float = Field(100.0, ge=0)
    """Mean squared error of the hidden states after a LayerNorm without weights."""
    mean: float = Field(5000.0, ge=0)
    """Squared difference of the per-token means."""
    variance: float = Field(5.0, ge=0)
    """Absolute difference of the per-token variances."""
    attention: float = Field(1.0, ge=0)
    """Cross-entropy of the student's attention under the teacher's; the teacher's heads are averaged in groups where it has more."""


class ImitateSection(Section):
    """Block-wise imitation of the wide network by the thin one."""

    schedule: Literal["hybrid", "parallel", "bottom_up", "joint"] = "hybrid"
    """hybrid: parallel, then a student-fed pass; parallel: every block on every batch; bottom_up: block after block; joint: end to end."""
    feed: Literal["auto", "teacher", "student"] = "auto"
    """Whose activations enter a student block; auto: the teacher's in parallel, the student's in bottom_up."""
    below: Literal["frozen", "slow", "joint"] = "frozen"
    """bottom_up: what the blocks under the current one do: nothing, learn at a tenth of the rate, or receive its gradient."""
    teacher_fed_share: float = Field(0.5, ge=0, le=1)
    """hybrid: share of the steps that are teacher-fed."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps that every block takes."""
    batch_size: int = Field(64, ge=1)
    """Samples a step takes."""
    loss: Literal["energy_mse", "mobilebert"] = "energy_mse"
    """energy_mse: squared error over the teacher's energy (1.0: nothing learned); mobilebert: its terms per encoder layer."""
    mobilebert: MobileBertLoss = MobileBertLoss()
    unit: Literal["block", "stage"] = "block"
    """What imitates: every block, or every stage of the network as one (the four stages of a ResNet)."""
    depth_map: tuple[int, ...] = ()
    """Teacher block (from 1) whose output each student unit answers to; empty: evenly spread."""
    bridge: Literal["auto", "constrained", "free"] = "auto"
    """Outer widening: free pairs fold into the next block, or are refused; constrained ones cancel; auto picks by boundary."""
    init: Literal["matching", "random"] = "matching"
    """matching: tensors that have the teacher's shape start as the teacher's; random: none does (stem and head always start from its)."""
    optimizer: OptimizerSection = OptimizerSection(lr=3e-3, weight_decay=0.0)
    schedule_lr: ScheduleSection = ScheduleSection(name="cosine")
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm of one unit; 0 does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 under autocast."""
    cache_batches: int = Field(0, ge=0)
    """bottom_up with frozen blocks below: batches whose activations are kept and gone through again; 0: one for every step."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: ten in the stage."""
    log_every: int = Field(20, ge=1)
    """Steps between log records."""

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.feed != "auto" and self.schedule == "hybrid":
            raise ValueError(
                "feed is hybrid's own business (teacher, then student); leave it at auto or choose schedule parallel or bottom_up"
            )
        if self.feed == "teacher" and self.schedule == "joint":
            raise ValueError("feed teacher contradicts schedule joint, which goes through the student end to end; use feed auto")
        if self.feed == "teacher" and self.schedule == "bottom_up" and self.below != "frozen":
            raise ValueError("feed teacher leaves nothing for the blocks below to learn from; use below frozen")
        return self
