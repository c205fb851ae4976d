"""A whole run as one typed configuration."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

import wtn_pretrain.models  # noqa: F401  (registers families and presets)
from wtn_pretrain.config import Section, override, read_yaml, validate
from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.teacher import wide_shape
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.kernels.select import Kernels
from wtn_pretrain.models.base import BlockConfig, expand_preset
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.resnet.config import ResNetConfig
from wtn_pretrain.tasks.classify import ClassifySection
from wtn_pretrain.tasks.mlm import MlmSection
from wtn_pretrain.training.config import OptimizerSection, ScheduleSection, TrainSection


class RunSection(Section):
    """Where a run lives."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: its folder is FOLDER/NAME."""
    folder: str = "runs"
    """Folder of all runs."""
    seed: int = Field(0, ge=0)
    """Seed of the wide network; everything random follows from it."""
    time_limit: float = Field(0.0, ge=0)
    """Minutes after this start after which a stage saves at its next step and exits with code 75, as on SIGTERM and SIGUSR1; 0: none."""
    kernels: Kernels = "auto"
    """Fused kernels: auto takes the best that works on the device, torch none, triton and apex those alone (docs/kernels.md)."""


class WidenSection(Section):
    """How the wide network grows from the thin one."""

    inner: float = Field(4.0, ge=1)
    """Factor on the widths inside a block (heads and feed-forward; 3x3 convolution); block outputs keep their shape."""
    outer: float = Field(1.0, ge=1)
    """Factor on the carried width, and with it on all others."""
    blocks: tuple[int, ...] = ()
    """Blocks per stage of the wide network; empty: as many as the thin one's."""


class WideSection(TrainSection):
    """Stage 1, or the network from elsewhere that takes its place."""

    teacher: str = ""
    """A wide network that exists: it is the teacher of stage 2, its shape is read from it, and stage 1 and `widen` are not used. A run or a
    stage of one, a Hugging Face folder, a timm folder, a state dict in torchvision's names, a Megatron BERT checkpoint (docs/export.md)."""
    teacher_pickle: bool = False
    """Read `teacher` even if it is a pickle; tensors alone are then taken from it."""
    teacher_heads: int = Field(0, ge=0)
    """Attention heads of a `teacher` that does not tell them, a Megatron checkpoint without its arguments; 0: it does."""


class FinetuneSection(TrainSection):
    """Stage 3."""

    int8: bool = False
    """Train for int8: weights and activations are rounded where the static int8 export rounds them (Jacob et al. 2018)."""

    @model_validator(mode="after")
    def _rounds(self) -> Self:
        if self.int8 and self.tensor_parallel > 1:
            raise ValueError("int8 rounds whole layers, which tensor_parallel divides; use one of the two")
        if self.int8 and self.precision in ("bf16_weights", "fp16"):
            raise ValueError(f"int8 rounds fp32 weights, which there are not under precision {self.precision}; use bf16 or fp32")
        return self


class CompareSection(Section):
    """What the result is held against."""

    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds of the thin networks, by WIN and from scratch; the wide one is trained once."""
    scratch: bool = True
    """Train the same thin network from scratch, with as many samples as imitation and fine-tuning together."""
    optimizer: OptimizerSection | None = None
    """Optimizer of the scratch baseline; null takes finetune's, but it deserves tuning of its own."""
    schedule: ScheduleSection | None = None
    """Schedule of the scratch baseline; null takes wide's, or finetune's where a teacher from elsewhere is not trained."""


class Recipe(Section):
    """A run: thin network, how it is widened, task, data, the three stages, comparison and export."""

    run: RunSection
    model: Annotated[BertConfig | ResNetConfig, Field(discriminator="family")]
    widen: WidenSection = WidenSection()
    task: Annotated[MlmSection | ClassifySection, Field(discriminator="kind")]
    data: Annotated[TextData | ImageData, Field(discriminator="kind")]
    wide: WideSection = WideSection()
    narrow: ImitateSection = ImitateSection()
    finetune: FinetuneSection = FinetuneSection()
    compare: CompareSection = CompareSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and "model" in tree:
            return {**tree, "model": expand_preset(tree["model"])}
        return tree

    @model_validator(mode="after")
    def _combination(self) -> Self:
        needs = {"bert": ("mlm", "text"), "resnet": ("classify", "images")}
        task, data = needs[self.model.family]
        if self.task.kind != task:
            raise ValueError(f"task.kind {self.task.kind} does not fit model.family {self.model.family}; use {task}")
        if self.data.kind != data:
            raise ValueError(f"data.kind {self.data.kind} does not fit task.kind {task}; use {data}")
        if self.narrow.loss == "mobilebert" and self.model.family != "bert":
            raise ValueError("narrow.loss mobilebert is for encoder layers and the model is a resnet; use energy_mse")
        if len(set(self.compare.seeds)) != len(self.compare.seeds):
            raise ValueError(f"compare.seeds {list(self.compare.seeds)} names a seed twice; give different ones")
        if not self.wide.teacher:
            self.wide_model()
        if self.scratch_samples() % self.finetune.batch_size:
            raise ValueError(
                f"narrow.batch_size {self.narrow.batch_size} x narrow.steps {self.narrow.steps} is not a multiple of finetune.batch_size "
                f"{self.finetune.batch_size}, so the scratch baseline cannot see as many samples; use equal batch sizes"
            )
        return self

    def wide_model(self) -> BlockConfig:
        """The shape of the wide network; that of a teacher is read from it."""
        if self.wide.teacher:
            return wide_shape(self.model, self.wide.teacher, self.wide.teacher_pickle, self.wide.teacher_heads)
        return self.model.widen(self.widen.inner, self.widen.outer, self.widen.blocks or None)

    def scratch_samples(self) -> int:
        """Samples that the thin network sees in imitation and fine-tuning together."""
        return self.narrow.steps * self.narrow.batch_size + self.finetune.steps * self.finetune.batch_size

    def scratch(self) -> TrainSection:
        """The training of the baseline: fine-tuning's, over as many samples as WIN's thin network sees."""
        return self.finetune.model_copy(
            update={
                "steps": self.scratch_samples() // self.finetune.batch_size,
                "optimizer": self.compare.optimizer or self.finetune.optimizer,
                "schedule": self.compare.schedule or (self.finetune if self.wide.teacher else self.wide).schedule,
            }
        )

    def place(self) -> Path:
        return Path(self.run.folder) / self.run.name


def load_recipe(path: str | Path, assignments: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with `section.key=value` assignments applied.

    Raises:
        UserError: one line that names the key, what is wrong and the remedy.
    """
    tree = override(read_yaml(path), assignments or [])
    # an input path is meant from where the user stands; kept as given, so that a saved recipe reads like the one written
    return validate(Recipe, tree)


def check_writable(folder: Path) -> None:
    """Refuses a run folder that cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # no number of a process: containers on several nodes count alike
        probe = folder / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.folder: {folder} cannot be written ({error.strerror}); choose another --run.folder") from None
