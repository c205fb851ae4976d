"""What a DeepSpeed engine steps, and the states of that, where they lie on NVMe between steps."""

from typing import Any


class Swapped:
    """Brings the tensors that ZeRO 3 steps into memory one after another, as its step does. What lies in memory anyway is left there."""

    def __init__(self, wrapped: Any) -> None:
        """`wrapped`: the optimizer of a DeepSpeed engine."""
        self._wrapped = wrapped if getattr(wrapped, "swap_optimizer", False) else None
        self._here: int | None = None
        self._changes = False

    def bring(self, number: int, to_change: bool = False) -> None:
        """Brings tensor `number` with its states, and puts the one before it back. `to_change`: it has to be written when it goes."""
        if self._here == number:
            self._changes |= to_change
            return
        self.put_back()
        if self._wrapped is not None and self._wrapped._swappable_optimizer_subgroup(number):
            self._wrapped._optimizer_states_and_gradient_swap_in(number)
            self._here, self._changes = number, to_change

    def put_back(self) -> None:
        """Leaves nothing in memory."""
        if self._here is None or self._wrapped is None:
            return
        if self._changes:
            self._wrapped._optimizer_states_and_gradient_swap_out(self._here)
        else:
            self._wrapped._release_swap_buffers(self._here)
        self._here = None
