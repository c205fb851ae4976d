"""The keys of a training stage."""

from typing import Annotated, Literal, Self

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
    cpu_kernel: Literal["torch", "deepspeed"] = "torch"
    """Of an adamw that ZeRO offloads to the CPU: torch's fused kernel, or DeepSpeed's CPUAdam, compiled at first use (two minutes)."""


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
    precision: Literal["fp32", "bf16", "bf16_weights", "fp16"] = "fp32"
    """bf16: products in bfloat16 under autocast, weights fp32; bf16_weights, fp16: rounded weights, fp32 masters (fp16: loss scaling)."""
    tf32: bool = False
    """Let a GPU round the inputs of fp32 matrix products and convolutions to TensorFloat-32; no effect on devices without it."""
    deepspeed: str = "ds_configs/zero0.json"
    """DeepSpeed configuration: what is DeepSpeed's own (ZeRO stage, offload, communication)."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks among which every layer is divided (Megatron's tensor parallelism); the others see other samples."""
    sequence_parallel: bool = False
    """Divide the positions as well between those layers, for norms and dropout: less memory for activations. With tensor_parallel."""
    batch_norms: Literal["all", "rank"] = "all"
    """all: batch norms take the statistics of the samples of all ranks, so that their number changes nothing; rank: each of its own
    samples (of a micro-batch), and their running statistics are averaged. Published ImageNet recipes have 32 to 256 samples a rank."""
    checkpoint_activations: bool | Annotated[int, Field(ge=1)] = False
    """Compute activations anew in the backward pass instead of keeping them: true in every block, N in every N-th."""
    compile: bool = False
    """Compile the blocks (torch.compile); the first step takes a minute or more."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is evaluated and kept; 0: none."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between validations; 0: only at the end."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: ten in a run."""
    checkpoint_keep: int = Field(2, ge=1)
    """How many of the last checkpoints stay; of one alone nothing is left if it is damaged."""
    checkpoint_keep_every: int = Field(0, ge=0)
    """After every so many steps there is a checkpoint that stays for good; 0: none."""
    log_every: int = Field(20, ge=1)
    """Steps between log records."""
    max_skipped: int = Field(3, ge=0)
    """Steps in a row that may be left out as their loss or gradient is not finite; one more ends the run. 0: the first one does."""
    spike: float = Field(0.0, ge=0)
    """Robust standard deviations above the median of the last 64 losses from which a loss is a spike: recorded, with its samples; 0: off.
    Looking costs a reduction over the ranks a step, for which the host waits."""
    spike_rollbacks: int = Field(0, ge=0)
    """How often a stage goes back to its newest checkpoint on a spike, and past the batches since; further spikes are only recorded."""
    patience: float = Field(600.0, ge=1)
    """Seconds without progress in a step after which a rank counts as hung and the run ends; a dead or stopped one is noticed in 30."""

    @property
    def products(self) -> Literal["fp32", "tf32", "bf16", "fp16"]:
        """In which precision a GPU multiplies."""
        if self.precision == "fp16":
            return "fp16"
        return "bf16" if self.precision != "fp32" else "tf32" if self.tf32 else "fp32"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel divides positions over the ranks of tensor_parallel, which is 1; raise that or turn it off")
        if self.spike_rollbacks and not self.spike:
            raise ValueError(f"spike_rollbacks {self.spike_rollbacks} needs to know what a spike is; set spike, to 10 for example")
        if self.ema and self.tensor_parallel > 1:
            raise ValueError("ema keeps averages of whole layers, which tensor_parallel divides; use one of the two")
        if self.ema and self.precision in ("bf16_weights", "fp16"):
            raise ValueError(
                f"ema averages fp32 weights, which the network does not have under precision {self.precision}; use bf16 or fp32"
            )
        return self
