"""ResNet in the names of torchvision, which timm's ResNets share, and of the CIFAR networks that descend from them."""

import re
from collections.abc import Mapping

from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.conversion import told
from wtn_pretrain.models.resnet.config import ResNetConfig

EXPANSION = {"basic": 1, "bottleneck": 4}


def recognises(theirs: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of such a network, complete or not."""
    return "conv1.weight" in theirs and any(name.startswith("layer1.0.conv") for name in theirs)


def why_not(config: ResNetConfig) -> str | None:
    """None where torchvision's ResNet class can be built in this shape, else what it lacks."""
    if config.stem != "imagenet":
        return "its ResNet has no CIFAR stem"
    if config.shortcut != "projection":
        return "its ResNet has no shortcuts without parameters"
    planes = [64 * 2**stage for stage in range(4)]
    if len(config.depths) != 4 or config.stem_channels != 64:
        return f"its ResNet has 4 stages and a stem of 64 channels, not {len(config.depths)} and {config.stem_channels}"
    wanted = [width * EXPANSION[config.block] for width in planes]
    if list(config.channels) != wanted:
        return f"its ResNet has {wanted} output channels, not {list(config.channels)}"
    base = config.inner_channels[0]
    if list(config.inner_channels) != [base * 2**stage for stage in range(4)] or (config.block == "basic" and base != 64):
        return f"its ResNet has no inner channels {list(config.inner_channels)}"
    return None


def shape(theirs: Mapping[str, Tensor], source: str) -> ResNetConfig:
    """The shape that the keys show; images' size is not among it.

    Raises:
        UserError: they are those of a stem that is neither a 7x7 nor, with a classifier called `linear`, a 3x3 convolution.
    """
    cifar = "linear.weight" in theirs
    head = "linear.weight" if cifar else "fc.weight"
    depths: dict[int, int] = {}
    for name in theirs:
        found = re.match(r"layer(\d+)\.(\d+)\.", name)
        if found:
            stage, block = int(found[1]), int(found[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    last = "conv3" if "layer1.0.conv3.weight" in theirs else "conv2"
    needed = ["conv1.weight", head, *(f"layer{stage}.0.{part}.weight" for stage in range(1, len(depths) + 1) for part in ("conv1", last))]
    gone = [name for name in needed if name not in theirs]
    if gone:
        raise UserError(f"{source}: the shape of a ResNet cannot be read from its keys: missing {', '.join(gone)}")
    odd = [f"{name} {list(theirs[name].shape)}" for name in needed if theirs[name].dim() != (2 if name == head else 4)]
    kernel = 3 if cifar else 7
    if not odd and list(theirs["conv1.weight"].shape[2:]) != [kernel, kernel]:
        odd = [f"conv1.weight {list(theirs['conv1.weight'].shape)}, whose kernel is not {kernel}x{kernel} (with a classifier {head})"]
    if odd:
        raise UserError(f"{source}: its keys do not fit a resnet: of another shape {', '.join(odd)}")
    stages = range(1, len(depths) + 1)
    shape = {
        "block": "bottleneck" if last == "conv3" else "basic",
        "stem": "cifar" if cifar else "imagenet",
        "shortcut": "padding" if cifar and not any(".downsample." in name for name in theirs) else "projection",
        "depths": tuple(depths[stage] for stage in stages),
        "channels": tuple(theirs[f"layer{stage}.0.{last}.weight"].shape[0] for stage in stages),
        "inner_channels": tuple(theirs[f"layer{stage}.0.conv1.weight"].shape[0] for stage in stages),
        "stem_channels": theirs["conv1.weight"].shape[0],
        "image_channels": theirs["conv1.weight"].shape[1],
        "classes": theirs[head].shape[0],
    }
    return told(ResNetConfig, source, shape)


def names(config: ResNetConfig) -> dict[str, str]:
    """Their name of every tensor -> ours."""
    head = "linear" if config.stem == "cifar" else "fc"
    pairs = [
        ("conv1.weight", "stem.conv.weight"),
        *_norm("bn1", "stem.norm"),
        (f"{head}.weight", "head.classifier.weight"),
        (f"{head}.bias", "head.classifier.bias"),
    ]
    width, number = config.stem_channels, 0
    for stage, (depth, outer) in enumerate(zip(config.depths, config.channels, strict=True)):
        for index in range(depth):
            theirs, ours = f"layer{stage + 1}.{index}", f"blocks.{number}"
            for part in range(3 if config.block == "bottleneck" else 2):
                pairs.append((f"{theirs}.conv{part + 1}.weight", f"{ours}.convs.{part}.weight"))
                pairs += _norm(f"{theirs}.bn{part + 1}", f"{ours}.norms.{part}")
            changes = index == 0 and (stage > 0 or width != outer)
            if changes and config.shortcut == "projection":
                pairs.append((f"{theirs}.downsample.0.weight", f"{ours}.shortcut.0.weight"))
                pairs += _norm(f"{theirs}.downsample.1", f"{ours}.shortcut.1")
            width, number = outer, number + 1
    return dict(pairs)


def _norm(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
