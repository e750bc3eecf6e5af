"""How a feed-forward sublayer joins the residual stream.

Shapes by suffix: B sequences, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..contract import Context
from .chain import Chain
from .momentum import AdamStart, Momentum, RobustMomentum
from .parts import Site


class Residual(nn.Module):
    """``h + gain f(norm(h))``."""

    def __init__(self, site: Site, sublayer: nn.Module, *, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, hidden_BSH: Tensor, norm: nn.Module, sublayer: nn.Module, context: Context) -> Tensor:
        out = sublayer(norm(hidden_BSH), context)
        return hidden_BSH + (out if self.gain == 1 else self.gain * out)


WIRINGS: dict[str, Callable[..., Any]] = {
    "residual": Residual,
    "chain": Chain,
    "momentum": Momentum,
    "adam-momentum": AdamStart,
    "robust-momentum": RobustMomentum,
}
"""By the name a configuration gives; built with (site, sublayer), called with (hidden, norm, sublayer, context).

They return the new hidden states."""
