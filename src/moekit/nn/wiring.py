"""How a feed-forward sublayer joins the residual stream.

Shapes by suffix: B sequences, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..contract import Context
from .parts import Site


class Residual(nn.Module):
    """``h + f(norm(h))``."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, hidden_BSH: Tensor, norm: nn.Module, sublayer: nn.Module, context: Context) -> Tensor:
        return hidden_BSH + sublayer(norm(hidden_BSH), context)


WIRINGS: dict[str, Callable[..., Any]] = {"residual": Residual}
"""By the name a configuration gives; called with (hidden, norm, sublayer, context), returns the new hidden states."""
