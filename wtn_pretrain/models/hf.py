"""Block networks from and to Hugging Face models; the renaming lives in each family's own `hf` module."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, families
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
    for family in families():
        adapter = _adapter(family)
        if model.config.model_type in adapter.MODEL_TYPES:
            config = adapter.shape(model)
            network = config.build()
            theirs = model.state_dict()
            ours = {mine: theirs[name] for name, mine in adapter.names(config).items()}
            load_state(network, ours, "teacher")
            return network.eval()
    raise UserError(f"teacher: no block network for Hugging Face's {model.config.model_type!r}; supported: bert, megatron-bert, resnet")
