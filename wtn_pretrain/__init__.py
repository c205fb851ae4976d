"""Trains a deep thin network that is as good as a much larger one, and ships it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wtn_pretrain.exchange.api import export as export
    from wtn_pretrain.exchange.api import load as load

__all__ = ["export", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, which --help and the configuration need not wait for
    if name in __all__:
        from wtn_pretrain.exchange import api

        return getattr(api, name)
    raise AttributeError(f"module 'wtn_pretrain' has no attribute {name!r}")
