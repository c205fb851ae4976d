"""The block network: the one contract that widening, imitation, merging, planning and export go through.

    stem(inputs) -> carry;  blocks[i](carry) -> carry;  head(carry) -> logits

Shape suffixes used in the models: B batch, S sequence, D carried width, H heads, K head size, F feed-forward, V vocabulary,
C channels, Y/X rows and columns, P predicted positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import FlopCounterMode

from wtn_pretrain.config import Section
from wtn_pretrain.errors import UserError


class Carry(NamedTuple):
    """What flows from block to block."""

    hidden: Tensor
    """The hidden state: [B, S, D] for sequences, [B, C, Y, X] for images."""
    context: tuple[Tensor, ...] = ()
    """What every block needs unchanged (an attention mask), the same at every boundary."""

    def detach(self) -> "Carry":
        return Carry(self.hidden.detach(), self.context)


Flow = Carry | Mapping[str, Tensor]
"""What enters the stem or a block: the inputs of the network, or a carry."""

Taps = dict[str, Tensor]
"""What a block lays open for a loss when asked: for encoder layers `attention`, the scores before the softmax [B, H, S, S]."""


class BlockConfig(Section, ABC):
    """The shape of one block network; `widen` makes the shape of its wide partner."""

    family: str

    @abstractmethod
    def widen(self, inner: float, outer: float, blocks: tuple[int, ...] | None) -> Self:
        """The same architecture with inner and carried widths multiplied and, if given, `blocks` per stage.

        Raises:
            UserError: a factor gives a width that is not whole, or that the heads do not divide.
        """

    @property
    @abstractmethod
    def stages(self) -> tuple[int, ...]:
        """Consecutive blocks in each natural group."""

    @abstractmethod
    def build(self) -> "BlockNetwork":
        """A freshly initialised network of this shape."""

    @abstractmethod
    def example_inputs(self, batch: int, device: torch.device | str, length: int | None = None) -> dict[str, Tensor]:
        """Inputs of the right shape and dtype (zeros), for counting and shape checks; `length` of sequences, None: the longest."""

    def why_not_divisible(self, ranks: int, length: int | None = None) -> str | None:
        """None where layers of this shape can be divided over so many tensor-parallel ranks, else what stands against it and the remedy.

        Args:
            length: of sequences whose positions are divided as well; None: they are not.
        """
        return f"a {self.family} has no tensor parallelism; set it to 1"

    dynamic_axes: ClassVar[dict[str, dict[int, str]]]
    """For every input of an exported network, the axes whose size is free, by name."""


class BlockNetwork(nn.Module, ABC):
    """Stem, blocks and head."""

    config: BlockConfig
    # a family's own modules: what they hold is known there
    stem: Any
    blocks: nn.ModuleList
    head: Any
    channel_axis: ClassVar[int]
    """The axis of `carry.hidden` that holds the carried width."""

    def forward(self, inputs: Mapping[str, Tensor], **head: Any) -> Tensor:
        """Logits of a batch; `head` goes to the head (for masked language models, the positions to predict)."""
        return self.head(self.features(inputs), **head)

    def features(self, inputs: Mapping[str, Tensor]) -> Carry:
        """The carry after the last block."""
        carry = self.stem(inputs)
        for block in self.blocks:
            carry = block(carry)
        return carry

    @staticmethod
    def counted(carry: Carry) -> Tensor | None:
        """Bool [B, S]: the positions that a loss on the hidden state counts; None where all do."""
        return None

    def divide(self, group: ProcessGroup, sequence: bool) -> None:
        """Leaves this tensor-parallel rank's part of the network, in place; its configuration must allow it (`why_not_divisible`).

        Args:
            sequence: norms and dropout work on a part of the positions each.
        """
        raise NotImplementedError(f"{type(self).__name__} has no tensor parallelism")

    @abstractmethod
    def widths(self) -> list[int]:
        """The carried width at each boundary: after the stem, then after each block (length blocks + 1)."""

    @abstractmethod
    def why_not_foldable(self, boundary: int) -> str | None:
        """None where a linear map at `boundary` (0 = after the stem, i = after block i) folds exactly into what follows, else why not."""

    @abstractmethod
    def fold(self, boundary: int, matrix: Tensor) -> None:
        """Replaces what follows `boundary` by itself after `matrix` [d, d]: new(x) = old(matrix x), in place."""

    @abstractmethod
    def start_stem_from(self, wide: "BlockNetwork", reduce: Tensor | None) -> None:
        """Starts this stem from the wide one: equal where the widths are, else as near as `reduce` [d, D] brings it (or not at all)."""

    @abstractmethod
    def start_head_from(self, wide: "BlockNetwork", expand: Tensor | None, reduce: Tensor | None) -> None:
        """Starts this head from the wide one, through the top bridge (expand [D, d], reduce [d, D]) where widths differ."""


_registry: dict[str, type[BlockConfig]] = {}
_presets: dict[str, dict[str, Any]] = {}


def register(config: type[BlockConfig]) -> type[BlockConfig]:
    """Class decorator: makes a model family known by the literal of its `family` field."""
    _registry[config.model_fields["family"].default] = config
    return config


def preset(name: str, **values: Any) -> None:
    """Names a shape: `model: {preset: NAME}` stands for these values, and keys beside it override them."""
    _presets[name] = values


def families() -> Mapping[str, type[BlockConfig]]:
    return _registry


def preset_names() -> list[str]:
    return sorted(_presets)


def expand_preset(tree: Any) -> Any:
    """A model section with its preset written out."""
    if not isinstance(tree, Mapping) or "preset" not in tree:
        return tree
    name = tree["preset"]
    if name not in _presets:
        raise UserError(f"model.preset: no preset {name!r}; there are {', '.join(preset_names())}")
    return {**_presets[name], **{key: value for key, value in tree.items() if key != "preset"}}


def whole(value: float, what: str, key: str) -> int:
    """`value` as an int, or a refusal that names the width and the factor."""
    if abs(value - round(value)) > 1e-6 or round(value) < 1:
        raise UserError(f"{key}: gives {what} = {value:g}, which is not a whole number; choose a factor that does")
    return round(value)


def parameter_count(network: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def _counted(call: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


class Flops(NamedTuple):
    """FLOPs of a forward pass of one sample, two for a multiply-add, by part."""

    stem: int
    blocks: tuple[int, ...]
    head: int

    @property
    def total(self) -> int:
        return self.stem + sum(self.blocks) + self.head


def flops(config: BlockConfig, length: int | None = None, **head: Any) -> Flops:
    """FLOPs of a forward pass of one sample, counted by torch on meta tensors: nothing is computed.

    Matrix products, convolutions and attention are counted; norms and activations are not. `length` is that of a sequence
    (None: the longest), `head` goes to the head, such as the positions to predict [1, P].
    """
    with torch.device("meta"), torch.no_grad():
        network = config.build().eval()
        carry, stem = _counted(lambda: network.stem(config.example_inputs(1, "meta", length)))
        blocks = []
        for block in network.blocks:
            carry, count = _counted(partial(block, carry))
            blocks.append(count)
        _, top = _counted(lambda: network.head(carry, **head))
    return Flops(stem, tuple(blocks), top)


def boundary_shapes(config: BlockConfig) -> list[tuple[int, ...]]:
    """Shape of the carried hidden state of one sample after the stem and after each block."""
    with torch.device("meta"), torch.no_grad():
        network = config.build().eval()
        carry = network.stem(config.example_inputs(1, "meta"))
        shapes = [tuple(carry.hidden.shape[1:])]
        for block in network.blocks:
            carry = block(carry)
            shapes.append(tuple(carry.hidden.shape[1:]))
    return shapes


def channels_last(module: nn.Module) -> None:
    """Weights of convolutions in the layout of what flows through them, else each call copies them into it; in place."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
