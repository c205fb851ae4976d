"""The keys of a training stage."""

from typing import Literal, Self

from pydantic import Field, model_validator

from wtn_pretrain.config import Section


class OptimizerSection(Section):
    """An optimizer and its numbers."""

    name: Literal["adamw", "lamb", "sgd", "lars"] = "adamw"
    """adamw; lamb (You et al. 2020) for large batches of text; sgd with momentum; lars (You et al. 2017) for large batches of images."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate at the top of the schedule."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices and convolutions; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment (adamw, lamb)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator (adamw, lamb)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum (sgd, lars)."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    trust: float = Field(0.001, gt=0)
    """Trust coefficient (lars)."""


class ScheduleSection(Section):
    """The learning rate as a function of the step."""

    name: Literal["constant", "linear", "cosine", "polynomial", "steps"] = "linear"
    """Shape of the decay after the warm-up; steps divides at milestones."""
    warmup: float = Field(0.0, ge=0)
    """Linear warm-up: a number of steps, or below 1 a share of all steps."""
    final: float = Field(0.0, ge=0, le=1)
    """Where the decay ends, as a share of the top."""
    power: float = Field(1.0, gt=0)
    """Exponent (polynomial)."""
    milestones: tuple[float, ...] = (0.33, 0.67, 0.89)
    """Shares of all steps after which the rate is multiplied by gamma (steps)."""
    gamma: float = Field(0.1, gt=0, lt=1)
    """Factor at each milestone (steps)."""


class TrainSection(Section):
    """One training stage on labels or masked tokens (wide, finetune, scratch)."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(64, ge=1)
    """Samples an optimizer step takes over all ranks; ranks and accumulation only divide it."""
    micro_batch_size: int = Field(0, ge=0)
    """Samples one rank takes in one pass; 0: batch_size / ranks (no accumulation)."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 under autocast; weights and optimizer stay fp32."""
    deepspeed: str = "ds_configs/zero0.json"
    """DeepSpeed configuration: what is DeepSpeed's own (ZeRO stage, offload, communication)."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between validations; 0: only at the end."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: ten in a run."""
    log_every: int = Field(20, ge=1)
    """Steps between log records."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self
