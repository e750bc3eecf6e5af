"""Experts with stacked weights, and the other kinds a router may choose: they cost little or nothing.

Shapes by suffix: T tokens, M tokens of one expert, H hidden size, I intermediate size, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from ..errors import OptionError
from .ordered import GRU
from .parts import Site


class Standalone:
    """The configuration of experts outside a model: moekit's kernels run them."""

    _experts_implementation = "moekit"


@use_experts_implementation
class Experts(nn.Module):
    """Gated feed-forward experts, stacked as transformers' shared contract has them.

    ``gate_up_proj`` [E, 2I, H] with the gate rows first, ``down_proj`` [E, H, I]; ``config`` only says which
    implementation runs them.
    """

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__()
        self.num_experts = site.num_experts
        self.hidden_dim, self.intermediate_dim = site.hidden_size, site.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(site.num_experts, 2 * site.intermediate_size, site.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(site.num_experts, site.hidden_size, site.intermediate_size))
        self.act_fn = ACT2FN[site.activation]

    def initialise(self, std: float) -> None:
        init.normal_(self.gate_up_proj, mean=0.0, std=std)
        init.normal_(self.down_proj, mean=0.0, std=std)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], expert by expert: what every other implementation must return. The id E marks an unused slot."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if len(token):
                inner = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
                rows = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, slot, None]
                out = out.index_add(0, token, rows.to(out.dtype))
        return out


def shared_expert(config: Any) -> FeedForward | None:
    """What every token passes besides, or None."""
    width = config.shared_expert_intermediate_size
    return FeedForward(config.hidden_size, width, config.hidden_act) if width else None


class FeedForward(nn.Module):
    """One gated feed-forward layer that every token passes: a shared expert, or a dense layer."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_states: Tensor, context: Any = None) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Wide(FeedForward):
    """One gated feed-forward of a ``width`` of its own."""

    def __init__(self, site: Site, *, width: int) -> None:
        if width < 1:
            raise OptionError(f"an expert of width {width}: give 1 or more")
        super().__init__(site.hidden_size, width, site.activation)


class Zero(nn.Module):
    """An expert that adds nothing and costs nothing (MoE++, AdaMoE's null expert)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x_MH: Tensor) -> Tensor | None:
        return None


class Copy(nn.Module):
    """An expert that returns what it reads (MoE++)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x_MH: Tensor) -> Tensor | None:
        return x_MH


class Constant(nn.Module):
    """``a1 x + a2 v`` with a learnt vector v and ``[a1, a2] = softmax(W x)`` (MoE++, its constant expert)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(site.hidden_size))
        self.mix = nn.Linear(site.hidden_size, 2, bias=False)

    def initialise(self, std: float) -> None:
        init.normal_(self.vector)

    def forward(self, x_MH: Tensor) -> Tensor | None:
        a_M2 = self.mix(x_MH).softmax(-1)
        return a_M2[:, :1] * x_MH + a_M2[:, 1:] * self.vector


KINDS: dict[str, Callable[..., Any]] = {"zero": Zero, "copy": Copy, "constant": Constant, "wide": Wide, "gru": GRU}
"""Experts without stacked weights, by the name a configuration gives; each returns [M, H], or None for zeros. One that
reads its rows in order says ``ordered = True`` and is told their sequences too."""
