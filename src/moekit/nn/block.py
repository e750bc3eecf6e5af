"""How attention and what follows it make one layer.

Shapes by suffix: B sequences, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .parts import Site, make

Attend = Callable[[Tensor], Tensor]


class Sequential(nn.Module):
    """``h = x + attention(norm(x))``, then the feed-forward sublayer as its wiring joins it."""

    norms = 2
    wired = True

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, hidden_BSH: Tensor, layer: Any, attend: Attend, context: Context) -> Tensor:
        hidden_BSH = hidden_BSH + attend(layer.input_layernorm(hidden_BSH))
        return layer.wiring(hidden_BSH, layer.post_attention_layernorm, layer.mlp, context)


class Parallel(nn.Module):
    """``norm(x + g1 attention(x) + g2 f(x))``: both read the same input, each has a learnt scalar (Hydra).

    ``attention`` and ``feed_forward`` are where the scalars start.
    """

    norms = 1
    wired = False

    def __init__(self, site: Site, *, attention: float = 1.0, feed_forward: float = 0.5) -> None:
        super().__init__()
        self.start = (attention, feed_forward)
        self.gate = nn.Parameter(torch.tensor(self.start))

    def initialise(self, std: float) -> None:
        init.copy_(self.gate, torch.tensor(self.start))

    def forward(self, hidden_BSH: Tensor, layer: Any, attend: Attend, context: Context) -> Tensor:
        mixed, fed = attend(hidden_BSH), layer.mlp(hidden_BSH, context)
        return layer.post_attention_layernorm(hidden_BSH + self.gate[0] * mixed + self.gate[1] * fed)


BLOCKS: dict[str, Callable[..., Any]] = {"sequential": Sequential, "parallel": Parallel}
"""By the name a configuration gives; called with (hidden, layer, attend, context). With ``norms = 1`` a layer has no
norm before its attention; one that is not ``wired`` never calls the layer's wiring."""


def block_of(config: Any, site: Site) -> Any:
    """The block that a configuration names; raises :class:`OptionError` for a wiring that it would never call."""
    block = make("block", BLOCKS, config.block, site)
    if not block.wired and config.wiring != "residual":
        raise OptionError(f"block {config.block!r} joins both sublayers itself: leave out the wiring")
    return block
