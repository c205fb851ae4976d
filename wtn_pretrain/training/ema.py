"""An exponential moving average of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a network in fp32: what is evaluated and kept instead of the last weights.

    After the update number t (from 0), average <- decay_t average + (1 - decay_t) weights, with decay_t = min(decay, (1 + t) / (10 + t)),
    so that a short run is not held to its random start. Running means and variances of batch norms are averaged by the same rule:
    the network changes from step to step, and statistics of the last weights alone would belong to another network than the
    averaged weights. Integer buffers (counters) are left alone.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts from the network as it is. `network` keeps its parameters and buffers, in place, for as long as this is used."""
        if not 0 < decay < 1:
            raise ValueError(f"decay {decay} must lie between 0 and 1")
        self.decay, self.updates = decay, 0
        # tied weights have one name each, so they are averaged once
        self._values: dict[str, Tensor] = {
            name: value
            for name, value in [*network.named_parameters(), *network.named_buffers()]
            if value.is_floating_point() and value.numel()
        }
        self._averages = {name: value.detach().clone().float() for name, value in self._values.items()}
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now; call it after each optimizer step."""
        if self._swapped:
            raise RuntimeError("the averages stand in the network; update after swap() has ended")
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        # a few kernels for the whole network instead of two a tensor
        torch._foreach_lerp_(list(self._averages.values()), [value.detach().float() for value in self._values.values()], weight)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averages fp32 by the network's own names, and `updates` int64 []; tensors that are not copied."""
        return {"updates": torch.tensor(self.updates), **{f"average.{name}": value for name, value in self._averages.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            KeyError: a tensor is missing. ValueError: there is one too many, or one of another shape.
        """
        own = self.state_dict()
        if unknown := sorted(state.keys() - own.keys()):
            raise ValueError(f"the network has no {unknown[0]}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise ValueError(f"{name} has shape {list(state[name].shape)} for {list(value.shape)}")
        for name, average in self._averages.items():
            average.copy_(state[f"average.{name}"])
        self.updates = int(state["updates"])

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within, the network holds the averages; afterwards its own weights again, bit for bit."""
        if self._swapped:
            raise RuntimeError("the averages stand in the network already")
        values = [value.detach() for value in self._values.values()]
        kept = [value.clone() for value in values]
        with torch.no_grad():
            torch._foreach_copy_(values, list(self._averages.values()))
        self._swapped = True
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(values, kept)
            self._swapped = False
