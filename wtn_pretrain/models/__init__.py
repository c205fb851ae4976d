"""The block networks. Importing this package registers every family and preset; a new family is one more folder here."""

from wtn_pretrain.models.base import BlockConfig, BlockNetwork, Carry
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.resnet.config import ResNetConfig

__all__ = ["BertConfig", "BlockConfig", "BlockNetwork", "Carry", "ResNetConfig"]
