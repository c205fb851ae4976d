"""The shape of a ResNet."""

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig, preset, register, whole

if TYPE_CHECKING:
    from wtn_pretrain.models.resnet.model import ResNetNetwork


@register
class ResNetConfig(BlockConfig):
    """ResNet (He et al. 2016; v1.5: the stride stands in the 3x3 convolution), with the inner widths free of the outer ones."""

    family: Literal["resnet"] = "resnet"
    """Model family."""
    block: Literal["basic", "bottleneck"] = "bottleneck"
    """basic: two 3x3 convolutions; bottleneck: 1x1, 3x3, 1x1."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: 7x7 convolution of stride 2 and a max-pool; cifar: 3x3 convolution of stride 1."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks in each stage."""
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    """Output channels of each stage (the carried width)."""
    inner_channels: tuple[int, ...] = ()
    """Channels inside the blocks of each stage (of the 3x3 convolution); empty: a quarter of `channels` in bottlenecks, else equal."""
    shortcut: Literal["projection", "padding"] = "projection"
    """Where width or resolution changes. projection: a 1x1 convolution; padding: every second pixel and channels of zeros around, without
    parameters (He et al. 2016, option A), as CIFAR networks have it."""
    stem_channels: int = 64
    """Output channels of the stem."""
    image_channels: int = 0
    """Channels of the images; 0 takes them from the data."""
    image_size: int = 0
    """Rows and columns of the images; 0 takes them from the data."""
    classes: int = 0
    """Classes to tell apart; 0 takes them from the data."""
    zero_init_residual: bool = False
    """Start the last batch norm of every block at zero, so that the block starts as the identity (Goyal et al. 2017)."""

    dynamic_axes: ClassVar[dict[str, dict[int, str]]] = {"pixels": {0: "batch"}}

    @model_validator(mode="before")
    @classmethod
    def _inner(cls, tree: object) -> object:
        if isinstance(tree, dict) and not tree.get("inner_channels"):
            channels = tree.get("channels", cls.model_fields["channels"].default)
            quarter = 4 if tree.get("block", "bottleneck") == "bottleneck" else 1
            if isinstance(channels, list | tuple) and all(isinstance(value, int) for value in channels):
                if any(value % quarter for value in channels):
                    raise ValueError(f"channels {list(channels)}: a bottleneck's must be multiples of 4, or set inner_channels")
                tree = {**tree, "inner_channels": tuple(value // quarter for value in channels)}
        return tree

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if not len(self.depths) == len(self.channels) == len(self.inner_channels):
            raise ValueError(
                f"depths {list(self.depths)}, channels {list(self.channels)} and inner_channels {list(self.inner_channels)} "
                "must have one number a stage each"
            )
        for name in ("depths", "channels", "inner_channels"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {list(getattr(self, name))}; every stage needs at least 1")
        if self.shortcut == "padding":
            for before, after in pairwise((self.stem_channels, *self.channels)):
                if after < before:
                    raise ValueError(f"shortcut padding cannot go from {before} to {after} channels; use shortcut projection")
        if self.stem_channels < 1:
            raise ValueError(f"stem_channels is {self.stem_channels}; it must be at least 1")
        return self

    def widen(self, inner: float, outer: float, blocks: tuple[int, ...] | None) -> Self:
        if blocks is not None and len(blocks) != len(self.depths):
            raise UserError(
                f"widen.blocks: {len(blocks)} numbers for {len(self.depths)} stages; give one a stage, like {list(self.depths)}"
            )
        return self.model_copy(
            update={
                "stem_channels": whole(self.stem_channels * outer, "stem_channels", "widen.outer"),
                "channels": tuple(whole(width * outer, "channels", "widen.outer") for width in self.channels),
                "inner_channels": tuple(whole(width * outer * inner, "inner_channels", "widen.inner") for width in self.inner_channels),
                "depths": tuple(blocks) if blocks else self.depths,
            }
        )

    @property
    def stages(self) -> tuple[int, ...]:
        return self.depths

    def build(self) -> "ResNetNetwork":
        from wtn_pretrain.models.resnet.model import ResNetNetwork

        return ResNetNetwork(self)

    def example_inputs(self, batch: int, device: torch.device | str, length: int | None = None) -> dict[str, Tensor]:
        return {"pixels": torch.zeros(batch, self.image_channels, self.image_size, self.image_size, device=device)}


_imagenet = {"family": "resnet", "image_channels": 3, "image_size": 224, "classes": 1000}
preset("resnet18", **_imagenet, block="basic", depths=(2, 2, 2, 2), channels=(64, 128, 256, 512))
preset("resnet34", **_imagenet, block="basic", depths=(3, 4, 6, 3), channels=(64, 128, 256, 512))
preset("resnet50", **_imagenet, depths=(3, 4, 6, 3))
preset("resnet101", **_imagenet, depths=(3, 4, 23, 3))
preset("resnet152", **_imagenet, depths=(3, 8, 36, 3))
preset("wide-resnet50-2", **_imagenet, depths=(3, 4, 6, 3), inner_channels=(128, 256, 512, 1024))
preset("wide-resnet50-4", **_imagenet, depths=(3, 4, 6, 3), inner_channels=(256, 512, 1024, 2048))
_cifar = {"family": "resnet", "block": "basic", "stem": "cifar", "stem_channels": 16, "channels": (16, 32, 64)}
preset("cifar-resnet20", **_cifar, depths=(3, 3, 3))
preset("cifar-resnet56", **_cifar, depths=(9, 9, 9))
