"""Scorers that remember what the routers of earlier layers said about the same token.

What they remember lies in the carry, starts anew with every pass through the model and never goes from token to token,
so that generation needs no more than its key-value cache. Shapes by suffix: T tokens, H hidden size, P router state,
E choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import carry
from .parts import Site, Spec, make

_STATE, _LOGITS = "router state", "router logits"


def _mine(name: str, context: Context) -> str:
    """What routers of one place in a layer, such as its attention, remember by this name."""
    return f"{context.extra.get('owner', '')} {name}".strip()


class Begun(nn.RNNCellBase):
    """A cell begun as torch begins it, also where a model draws its weights."""

    def initialise(self, std: float) -> None:
        for parameter in self.parameters():
            init.uniform_(parameter, -1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))


class GRU(Begun, nn.GRUCell):
    """r, z, n gates (Cho et al. 2014)."""


class RNN(Begun, nn.RNNCell):
    """``tanh(W x + U r)``."""


CELLS: dict[str, Callable[..., Any]] = {"gru": GRU, "rnn": RNN}


class Recurrent(nn.Module):
    """``r_l = cell(A_l x, r_{l-1})`` and logits ``B_l r_l``: one cell for all layers, projections of each layer's own.

    Layerwise Recurrent Router (RMoE): r_0 = 0, ``width`` 256. ``detach`` cuts the gradient between layers (the paper's
    ablation). Layers without a router leave the state as it is.
    """

    def __init__(self, site: Site, *, width: int = 256, cell: str = "gru", detach: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise OptionError(f"width={width} of a recurrent router: give 1 or more")
        if cell not in CELLS:
            raise OptionError(f"cell={cell!r} of a recurrent router: choose one of {', '.join(CELLS)}")
        self.detach = detach
        self.inner = nn.Linear(site.hidden_size, width, bias=False)
        self.cell = site.shared(f"{cell} of width {width}", lambda: CELLS[cell](width, width))
        self.weight = nn.Parameter(self.inner.weight.new_zeros(site.choices, width))

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        state, mine = carry(context).state, _mine(_STATE, context)
        before = state.get(mine)
        if before is not None and self.detach:
            before = before.detach()
        now_TP = self.cell(self.inner(x_TH), before)
        state[mine] = now_TP
        return F.linear(now_TP, self.weight)


class Residual(nn.Module):
    """``of(x) + W G``: the logits G of the MoE layer before it, mapped, are added to those of another scorer (MoE++).

    G has had its own residual added already; the first layer has none. Raises :class:`OptionError` where layers choose
    among different numbers.
    """

    def __init__(self, site: Site, *, of: Spec = "linear") -> None:
        super().__init__()
        from .scorers import SCORERS

        self.scorer = make("scorer", SCORERS, of, site)
        self.map = nn.Linear(site.choices, site.choices, bias=False) if site.layer else None

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        state, mine = carry(context).state, _mine(_LOGITS, context)
        logits, before = self.scorer(x_TH, context), state.get(mine)
        if before is not None and self.map is not None:
            if before.shape[1] != self.map.in_features:
                raise OptionError(
                    f"a gating residual needs as many choices in every layer: {self.map.in_features} follow "
                    f"{before.shape[1]}"
                )
            logits = logits + self.map(before.to(self.map.weight.dtype))
        state[mine] = logits
        return logits
