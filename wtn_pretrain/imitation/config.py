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
    micro_batch_size: int = Field(0, ge=0)
    """Samples that flow through the pipeline at once; 0: batch_size (no accumulation). Losses and batch norms are over these."""
    plan: str = "auto"
    """Which ranks hold which units: auto, a file of tools/plan.py, or spans such as 0-3,4-6x2 (unit 0 is the stem; x2: on two ranks)."""
    deepspeed: str = "ds_configs/zero0.json"
    """DeepSpeed configuration of every span (ZeRO 0 to 2 within its replicas)."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """How activations travel between spans; bf16 halves what is sent and rounds it."""
    in_flight: int = Field(2, ge=2)
    """Micro-batches that wait before a span, and behind it; who is further ahead waits."""
    patience: float = Field(30.0, gt=0)
    """Seconds without a sign of life, or of progress, after which a rank counts as lost and the run ends."""
    trace: bool = False
    """Record what every rank does when, for Perfetto (trace.json) and for the report."""
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
    """Largest gradient norm of one unit (of all together where gradients run through all); 0 does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 under autocast."""
    offload: Literal["none", "host", "disk"] = "none"
    """Where units wait that are not being trained: none (all are on the device), host memory, or (the teacher's weights) disk."""
    offload_batches: int = Field(8, ge=1)
    """Steps that a unit takes each time it is brought; their activations at one boundary are held meanwhile."""
    cache: str = ""
    """Folder in which the teacher's outputs are kept for other students and runs; filled first if they are not there. All students of a
    cache see the batches of run.seed."""
    cache_dtype: Literal["as computed", "bf16"] = "as computed"
    """How the teacher's outputs lie in `cache`; bf16 halves it and rounds them."""
    cache_batches: int = Field(0, ge=0)
    """Batches whose activations are kept, in `cache` and by bottom_up with frozen blocks below, and gone through again; 0: all steps."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: ten in the stage."""
    checkpoint_keep: int = Field(2, ge=1)
    """How many of the last checkpoints stay; of one alone nothing is left if it is damaged."""
    checkpoint_keep_every: int = Field(0, ge=0)
    """After every so many steps there is a checkpoint that stays for good; 0: none."""
    log_every: int = Field(20, ge=1)
    """Steps between log records."""
    max_skipped: int = Field(3, ge=0)
    """Steps in a row that a unit may leave out as its loss or gradient is not finite; one more ends the run. 0: the first one does."""

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
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        if self.offload != "none" and (self.schedule == "joint" or (self.schedule == "bottom_up" and self.below != "frozen")):
            raise ValueError(f"offload {self.offload} holds one unit at a time, and this schedule trains several at once; use offload none")
        if self.cache and self.loss == "mobilebert" and self.mobilebert.attention > 0:
            raise ValueError("cache holds hidden states and loss mobilebert needs the teacher's attention; set mobilebert.attention to 0")
        if self.plan != "auto" and self.schedule in ("bottom_up", "joint"):
            raise ValueError(f"plan {self.plan} does not fit schedule {self.schedule}, which splits every batch over all ranks; use auto")
        return self
