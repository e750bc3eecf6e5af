"""Several passes over the experts of one layer, each reading what the last one wrote.

Shapes by suffix: B sequences, S positions, H hidden size, E choices.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .layer import MoE
from .parts import Site
from .tally import Tally


class Again(MoE):
    """A further pass over the experts of ``owner``: a router, balance terms and a bias of its own, no experts.

    The experts are looked up at every call, so that whatever takes their place is used here too, and they stay
    parameters of one module only. What routers of several layers have in common (``site``) this pass has too.
    """

    def __init__(self, owner: MoE, site: Site) -> None:
        nn.Module.__init__(self)
        self._owner = (owner,)  # in a tuple, a module is not registered as a part of this one
        self.gate = deepcopy(owner.gate, {id(module): module for module in site.common.values()})
        self.balance, self.weight_of = deepcopy(owner.balance), owner.weight_of
        self.correction = deepcopy(owner.correction)
        self.tally = Tally(owner.gate.num_experts)

    @property
    def experts(self) -> nn.Module:
        return self._owner[0].experts

    @property
    def others(self) -> nn.ModuleList:
        return self._owner[0].others

    @property
    def shared_expert(self) -> nn.Module | None:  # type: ignore[override]
        return self._owner[0].shared_expert


class Chain(nn.Module):
    """``x_0 = norm(h)``, ``x_t = x_{t-1} + f_t(x_{t-1})`` for ``passes`` passes; ``x_C`` leaves the layer.

    Chain-of-Experts: every pass has a router of its own over the same experts, and h itself is not added back. For
    equal compute each pass uses a C-th of the slots.

    Args:
        inner: add what a pass reads to what it returns.
        outer: add h to what leaves.
        own_routers: one router per pass; otherwise one for all.
    """

    def __init__(
        self,
        site: Site,
        sublayer: nn.Module,
        *,
        passes: int = 2,
        inner: bool = True,
        outer: bool = False,
        own_routers: bool = True,
    ) -> None:
        super().__init__()
        if type(passes) is not int or passes < 1:
            raise OptionError(f"passes={passes!r} of a chain: give a whole number from 1 on")
        if not isinstance(sublayer, MoE):
            raise OptionError(f"a chain runs over an MoE layer, and this sublayer is a {type(sublayer).__name__}")
        self.passes, self.inner, self.outer = passes, inner, outer
        self.later = nn.ModuleList([Again(sublayer, site) for _ in range(passes - 1)] if own_routers else [])

    def forward(self, hidden_BSH: Tensor, norm: nn.Module, sublayer: nn.Module, context: Context) -> Tensor:
        x_BSH = norm(hidden_BSH)
        layers: list[Any] = [sublayer, *self.later] if len(self.later) else [sublayer] * self.passes
        for layer in layers:
            out = layer(x_BSH, context)
            x_BSH = x_BSH + out if self.inner else out
        return hidden_BSH + x_BSH if self.outer else x_BSH
