"""Image classification."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from wtn_pretrain.config import Section
from wtn_pretrain.data.contents import labels_digest
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.resizing import ResizedStream, side_at, steps_at
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, Flops, flops
from wtn_pretrain.models.resnet.config import ResNetConfig
from wtn_pretrain.tasks.base import Metric, Task, classified


class ClassifySection(Section):
    """Image classification."""

    kind: Literal["classify"] = "classify"
    """Task."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability spread evenly over all classes in the training target."""


class ClassifyTask(Task):
    """Tell classes apart; the loss is the mean cross-entropy with the labels, where images are mixed with both labels by their shares."""

    metric = Metric("top-1 accuracy", "%", True)

    def __init__(self, section: ClassifySection, data: ImageData, cache: Path | None = None) -> None:
        splits = open_images(data, cache)
        self.splits, self.data = splits, data
        self.train, self.valid = splits.train, splits.valid
        self.identity = {"data.labels": labels_digest(splits.train.labels)}
        self.smoothing = section.label_smoothing
        self.workers = data.workers

    def complete(self, config: BlockConfig) -> BlockConfig:
        assert isinstance(config, ResNetConfig)
        facts = {"image_channels": self.splits.channels, "image_size": self.splits.size, "classes": len(self.splits.classes)}
        for key, value in facts.items():
            if getattr(config, key) not in (0, value):
                raise UserError(
                    f"model.{key}: is {getattr(config, key)} and the data has {value}; set it to {value}, or 0 to take the data's"
                )
        return config.model_copy(update=facts)

    def loss(self, network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
        logits = network(batch).float()
        if "own_share" not in batch:
            return {"loss": F.cross_entropy(logits, batch["labels"], label_smoothing=self.smoothing)}
        # cross-entropy is linear in the target: no [B, classes] of probabilities is needed
        own, partner = (
            F.cross_entropy(logits, batch[name], label_smoothing=self.smoothing, reduction="none") for name in ("labels", "partner_labels")
        )
        return {"loss": partner.lerp(own, batch["own_share"]).mean()}

    def stream(self, batch_size: int, *, steps: int, **settings: Any) -> BatchStream:
        """The training batches of a stage of `steps` steps, of the sides that `data.sizes` says; `settings` are those of `BatchStream`."""
        if not self.data.sizes:
            return BatchStream(self.train, batch_size, workers=self.workers, **settings)
        return ResizedStream(self.splits.train, batch_size, sizes=self.data.sizes, steps=steps, workers=self.workers, **settings)

    def tally(self, network: BlockNetwork, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return classified(network(batch), batch["labels"])

    def positions(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def probes(self) -> list[dict[str, Tensor]]:
        pixels = next(batches(self.valid, 8))["pixels"]
        return [{"pixels": pixels[:count]} for count in (1, 3, len(pixels))]

    def save_preprocessing(self, folder: Path) -> None:
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        size = self.splits.size
        processor = BitImageProcessorPil(
            size={"shortest_edge": round(size / self.data.crop_fraction)},
            crop_size={"height": size, "width": size},
            resample=Image.Resampling.BILINEAR,
            image_mean=list(self.splits.mean),
            image_std=list(self.splits.std),
            do_convert_rgb=self.splits.channels == 3,
        )
        # under the name that every version of transformers knows, and opens with Pillow where torchvision is not installed
        told = {**json.loads(processor.to_json_string()), "image_processor_type": "BitImageProcessor"}
        write_text(folder / "preprocessor_config.json", json.dumps(told, indent=2, sort_keys=True) + "\n")

    def forward_flops(self, config: BlockConfig) -> Flops:
        return flops(config)

    def step_flops(self, config: BlockConfig, step: int, steps: int) -> Flops:
        """As `forward_flops`, for the images of step number `step` (from 0) of a stage of `steps`."""
        return self._flops_at(config, side_at(self.data.sizes, self.splits.size, step, steps))

    def stage_flops(self, config: BlockConfig, steps: int) -> float:
        """FLOPs of a forward pass of one sample, in the mean over a stage of `steps` steps."""
        counts = steps_at(self.data.sizes, self.splits.size, steps)
        return sum(self._flops_at(config, side).total * count for side, count in counts.items()) / steps

    @staticmethod
    def _flops_at(config: BlockConfig, side: int) -> Flops:
        return _counted_flops(config.model_copy(update={"image_size": side}))


@lru_cache(maxsize=64)
def _counted_flops(config: BlockConfig) -> Flops:
    # asked for at every step, and counting takes a while
    return flops(config)
