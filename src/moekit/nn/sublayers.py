"""What follows attention in a layer, in the kinds a configuration can name.

Shapes by suffix: B sequences, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .balance import balance_term
from .banks import BANKS
from .correction import Correction
from .decomposed import Decomposed
from .experts import KINDS, FeedForward, shared_expert
from .layer import MoE
from .parts import Site, built, make
from .rank_one import Memory
from .router import Router


def moe_layer(config: Any, layer: int) -> MoE:
    """The MoE layer that a configuration describes."""
    site = config.site(layer)
    return MoE(
        Router(site, config.router, corrected=config.correction is not None),
        bank(config, site),
        shared=shared_expert(config),
        others=[make("expert", KINDS, kind, site) for kind in config.others or ()],
        balance={name: balance_term(name, spec, site) for name, spec in (config.balance or {}).items()},
        correction=None if config.correction is None else built("correction", Correction, config.correction),
    )


def bank(config: Any, site: Site) -> nn.Module:
    """The experts of a layer, or those of a group of layers, which is one module in all of them (ReXMoE)."""
    create = partial(make, "experts", BANKS, config.experts, config, site)
    if config.layers_per_bank == 1:
        return create()
    experts: nn.Module = site.shared(f"experts from layer {min(config.bank_layers(site.layer))} on", create)
    if set(experts.state_dict()) - {name for name, _ in experts.named_parameters()}:  # only parameters are tied
        raise OptionError(f"experts {config.experts!r} keep more than weights: no bank of several layers can be saved")
    return experts


def dense_layer(config: Any, layer: int) -> FeedForward:
    """One feed-forward for every token."""
    return FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)


class Nothing(nn.Module):
    """Adds nothing: a layer of attention alone."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()

    def forward(self, hidden_BSH: Tensor, context: Context | None = None) -> Tensor:
        return hidden_BSH * 0  # the norm before it stays in the graph: ranks wait for every gradient


FEED_FORWARDS: dict[str, Callable[..., Any]] = {
    "moe": moe_layer,
    "dense": dense_layer,
    "nothing": Nothing,
    "memory": Memory,
    "decomposed": Decomposed,
}
"""By the name a configuration gives; built with (config, layer), called with (hidden [.., H], context)."""
