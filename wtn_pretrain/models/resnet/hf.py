"""ResNet in Hugging Face's names."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.conversion import told
from wtn_pretrain.models.resnet.config import ResNetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPES = ("resnet",)


def why_not(config: ResNetConfig) -> str | None:
    """None where Hugging Face has this architecture, else what it lacks."""
    if config.stem != "imagenet":
        return "its ResNet has no CIFAR stem"
    if config.shortcut != "projection":
        return "its ResNet has no shortcuts without parameters"
    quarter = 4 if config.block == "bottleneck" else 1
    if any(inner * quarter != outer for inner, outer in zip(config.inner_channels, config.channels, strict=True)):
        return "its ResNet has no inner-widened blocks"
    return None


def empty(config: ResNetConfig) -> "PreTrainedModel":
    """A Hugging Face model of this shape, weights not yet loaded."""
    from transformers import ResNetConfig as HfResNet
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification(
        HfResNet(
            num_channels=config.image_channels,
            embedding_size=config.stem_channels,
            hidden_sizes=list(config.channels),
            depths=list(config.depths),
            layer_type=config.block,
            hidden_act="relu",
            num_labels=config.classes,
        )
    )


def shape(hf: Any, keys: Collection[str], source: str) -> ResNetConfig:
    """The shape that a Hugging Face configuration tells; it does not say for which image size it was made.

    Raises:
        UserError: it tells of something that our ResNet is not, or there is no classifier.
    """
    for key, wanted in (("hidden_act", "relu"), ("downsample_in_first_stage", False), ("downsample_in_bottleneck", False)):
        if getattr(hf, key) != wanted:
            raise UserError(f"{source}: {key} {getattr(hf, key)!r} is not supported, only {wanted!r}")
    if not any(name.startswith("classifier.") for name in keys):
        raise UserError(f"{source}: has no classifier; give a ResNetForImageClassification")
    shape = {
        "block": hf.layer_type,
        "depths": hf.depths,
        "channels": hf.hidden_sizes,
        "stem_channels": hf.embedding_size,
        "image_channels": hf.num_channels,
        "classes": hf.num_labels,
    }
    return told(ResNetConfig, source, shape)


def canonical(theirs: Mapping[str, Tensor], config: ResNetConfig, source: str) -> dict[str, Tensor]:
    """The weights as they are: they say nothing twice."""
    return dict(theirs)


def names(config: ResNetConfig) -> dict[str, str]:
    """Hugging Face's name of every tensor -> ours."""
    pairs = [
        ("resnet.embedder.embedder.convolution.weight", "stem.conv.weight"),
        *_norm("resnet.embedder.embedder.normalization", "stem.norm"),
        ("classifier.1.weight", "head.classifier.weight"),
        ("classifier.1.bias", "head.classifier.bias"),
    ]
    width, block = config.stem_channels, 0
    for stage, (depth, outer) in enumerate(zip(config.depths, config.channels, strict=True)):
        for index in range(depth):
            theirs, ours = f"resnet.encoder.stages.{stage}.layers.{index}", f"blocks.{block}"
            for part in range(3 if config.block == "bottleneck" else 2):
                pairs.append((f"{theirs}.layer.{part}.convolution.weight", f"{ours}.convs.{part}.weight"))
                pairs += _norm(f"{theirs}.layer.{part}.normalization", f"{ours}.norms.{part}")
            if index == 0 and (stage > 0 or width != outer):
                pairs.append((f"{theirs}.shortcut.convolution.weight", f"{ours}.shortcut.0.weight"))
                pairs += _norm(f"{theirs}.shortcut.normalization", f"{ours}.shortcut.1")
            width, block = outer, block + 1
    return dict(pairs)


def _norm(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
