"""ResNet as a block network: first convolution and pool, residual blocks, pool and classifier."""

from collections.abc import Mapping
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.models.base import BlockNetwork, Carry, Taps
from wtn_pretrain.models.resnet.config import ResNetConfig


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class ResNetStem(nn.Module):
    """First convolution, batch norm, ReLU and, for ImageNet, max-pool: `pixels` [B, C, Y, X] -> carry."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        imagenet = config.stem == "imagenet"
        self.conv = _conv(config.image_channels, config.stem_channels, 7 if imagenet else 3, 2 if imagenet else 1)
        self.norm = nn.BatchNorm2d(config.stem_channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

    def forward(self, inputs: Mapping[str, Tensor]) -> Carry:
        # the layout that convolutions are fastest in, on CPUs and tensor cores alike; everything above inherits it
        pixels = inputs["pixels"].contiguous(memory_format=torch.channels_last)
        return Carry(self.pool(torch.relu(self.norm(self.conv(pixels)))))


class PaddingShortcut(nn.Module):
    """Every `stride`-th row and column, between channels of zeros, half of them on either side: [B, C, Y, X] -> [B, outputs, Y', X']."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.below = stride, (outputs - inputs) // 2
        self.above = outputs - inputs - self.below

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.below, self.above))


class ResNetBlock(nn.Module):
    """ReLU(shortcut(x) + residual(x)); the shortcut is the identity unless width or resolution changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, bottleneck: bool, shortcut: str = "projection") -> None:
        super().__init__()
        if bottleneck:
            layers = [(_conv(inputs, inner, 1), inner), (_conv(inner, inner, 3, stride), inner), (_conv(inner, outputs, 1), outputs)]
        else:
            layers = [(_conv(inputs, inner, 3, stride), inner), (_conv(inner, outputs, 3), outputs)]
        self.convs = nn.ModuleList(conv for conv, _ in layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _, width in layers)
        self.shortcut: nn.Sequential | PaddingShortcut | None = None
        if stride == 1 and inputs == outputs:
            return
        if shortcut == "padding":
            self.shortcut = PaddingShortcut(inputs, outputs, stride)
        else:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, carry: Carry, taps: Taps | None = None) -> Carry:
        x = carry.hidden
        residual = x if self.shortcut is None else self.shortcut(x)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            # in place: a batch norm's backward pass needs its input, not its output
            x = norm(conv(torch.relu_(x) if index else x))
        return Carry(torch.relu_(x.add_(residual)), carry.context)


class ResNetHead(nn.Module):
    """Global average pool and classifier: carry -> logits [B, classes]."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(config.channels[-1], config.classes)

    def forward(self, carry: Carry) -> Tensor:
        return self.classifier(carry.hidden.mean(dim=(2, 3)))


class ResNetNetwork(BlockNetwork):
    """ResNet for image classification."""

    config: ResNetConfig
    channel_axis: ClassVar[int] = 1

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ResNetStem(config)
        blocks = []
        width = config.stem_channels
        for stage, (depth, inner, outer) in enumerate(zip(config.depths, config.inner_channels, config.channels, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(ResNetBlock(width, inner, outer, stride, config.block == "bottleneck", config.shortcut))
                width = outer
        self.blocks = nn.ModuleList(blocks)
        self.head = ResNetHead(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.config.zero_init_residual:
            for block in self._typed_blocks():
                nn.init.zeros_(block.norms[-1].get_parameter("weight"))

    def _typed_blocks(self) -> list[ResNetBlock]:
        return [block for block in self.blocks if isinstance(block, ResNetBlock)]

    def widths(self) -> list[int]:
        per_block = [width for depth, width in zip(self.config.depths, self.config.channels, strict=True) for _ in range(depth)]
        return [self.config.stem_channels, *per_block]

    def why_not_foldable(self, boundary: int) -> str | None:
        if boundary < len(self.blocks) and not isinstance(self.blocks[boundary].shortcut, nn.Sequential):
            ends = list(accumulate(self.config.depths))
            stage = next(number for number, end in enumerate(ends, start=1) if boundary < end)
            kind = "identity" if self.blocks[boundary].shortcut is None else "padded"
            return f"the {kind} skip of block {boundary + 1} (stage {stage}) carries the unmerged feature map past its convolutions"
        return None

    def fold(self, boundary: int, matrix: Tensor) -> None:
        reason = self.why_not_foldable(boundary)
        if reason:
            raise RuntimeError(reason)
        with torch.no_grad():
            if boundary == len(self.blocks):
                # the average pool commutes with a map of channels
                self.head.classifier.weight.copy_(self.head.classifier.weight @ matrix)
                return
            block = self._typed_blocks()[boundary]
            assert isinstance(block.shortcut, nn.Sequential)
            for conv in (block.convs[0], block.shortcut[0]):
                weight = conv.get_parameter("weight")
                weight.copy_(torch.einsum("ocyx,ci->oiyx", weight, matrix))

    def start_stem_from(self, wide: BlockNetwork, reduce: Tensor | None) -> None:
        # a projected convolution would not commute with its batch norm and ReLU: under outer widening the stem learns from its start
        if reduce is None:
            self.stem.load_state_dict(wide.stem.state_dict())

    def start_head_from(self, wide: BlockNetwork, expand: Tensor | None, reduce: Tensor | None) -> None:
        with torch.no_grad():
            weight = wide.head.classifier.weight
            self.head.classifier.weight.copy_(weight if expand is None else weight @ expand)
            self.head.classifier.bias.copy_(wide.head.classifier.bias)
