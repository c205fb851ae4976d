"""Image classification."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from wtn_pretrain.config import Section
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.stream import batches
from wtn_pretrain.errors import UserError
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
    """Tell classes apart; the loss is the mean cross-entropy."""

    metric = Metric("top-1 accuracy", "%", True)

    def __init__(self, section: ClassifySection, data: ImageData) -> None:
        splits = open_images(data)
        self.splits, self.data = splits, data
        self.train, self.valid = splits.train, splits.valid
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

    def loss(self, network: BlockNetwork, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(network(batch).float(), batch["labels"], label_smoothing=self.smoothing)}

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
        BitImageProcessorPil(
            size={"shortest_edge": round(size / self.data.crop_fraction)},
            crop_size={"height": size, "width": size},
            resample=Image.Resampling.BILINEAR,
            image_mean=list(self.splits.mean),
            image_std=list(self.splits.std),
            do_convert_rgb=self.splits.channels == 3,
        ).save_pretrained(folder)

    def forward_flops(self, config: BlockConfig) -> Flops:
        return flops(config)
