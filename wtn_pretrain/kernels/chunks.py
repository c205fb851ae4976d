"""How much of a large tensor is made at a time."""

from torch import Tensor

from wtn_pretrain.device import device


def at_once(tensor: Tensor, on_cpu: int, elsewhere: int) -> int:
    """Elements of a chunk of work on `tensor`: its device's. For a tensor without data, that which stands for it: this rank's."""
    kind = device().type if tensor.is_meta else tensor.device.type
    return on_cpu if kind == "cpu" else elsewhere
