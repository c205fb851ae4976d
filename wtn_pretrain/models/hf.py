"""Block networks from and to Hugging Face models; the renaming lives in each family's own `hf` module."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, families
from wtn_pretrain.models.conversion import convert
from wtn_pretrain.models.store import load_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _adapter(family: str) -> ModuleType:
    return importlib.import_module(f"wtn_pretrain.models.{family}.hf")


def why_not_hf(config: BlockConfig) -> str | None:
    """None where Hugging Face has this architecture, else what it lacks."""
    return _adapter(config.family).why_not(config)


def to_hf(network: BlockNetwork) -> "PreTrainedModel":
    """The same network as a Hugging Face model, on the CPU in fp32 and eval mode; weights are copied bit by bit.

    Raises:
        UserError: Hugging Face has no such architecture.
    """
    adapter = _adapter(network.config.family)
    reason = adapter.why_not(network.config)
    if reason:
        raise UserError(f"export.formats: Hugging Face cannot hold this network: {reason}; use onnx")
    model = adapter.empty(network.config)
    names = adapter.names(network.config)
    ours = network.state_dict()
    theirs = {name: ours[mine].detach().cpu() for name, mine in names.items()}
    load_state(model, theirs, "export")
    return model.eval()


def from_hf(model: "PreTrainedModel") -> BlockNetwork:
    """A Hugging Face model as a block network: BERT and Megatron BERT `ForMaskedLM` or `ForPreTraining`, `ResNetForImageClassification`.

    Raises:
        UserError: the architecture is not one that the block networks hold.
    """
    config, state = from_hf_state(model.config, model.state_dict(), "teacher")
    network = config.build()
    load_state(network, state, "teacher")
    return network.eval()


def from_hf_state(hf: Any, theirs: Mapping[str, Tensor], source: str) -> tuple[BlockConfig, dict[str, Tensor]]:
    """Shape and weights, under our names, of a Hugging Face configuration and state dict; nothing is computed.

    Raises:
        UserError: the architecture is not one that the block networks hold, or keys are missing, unexpected or of another shape.
    """
    for family in families():
        adapter = _adapter(family)
        if hf.model_type in adapter.MODEL_TYPES:
            config = adapter.shape(hf, theirs.keys(), source)
            return config, convert(adapter.canonical(theirs, config, source), adapter.names(config), config, source)
    raise UserError(f"{source}: no block network for Hugging Face's {hf.model_type!r}; supported: bert, megatron-bert, resnet")
