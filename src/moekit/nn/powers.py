"""Experts whose weights are signed powers of two: a product with one is a shift of bits.

Shapes by suffix: T tokens, H hidden size, I intermediate size, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from ..errors import OptionError
from .experts import Experts
from .parts import Site


def power_of_two(weight: Tensor, lowest: int = -15, highest: int = 0) -> Tensor:
    """``sign(w) 2^round(log2 |w|)``, the exponent kept within ``lowest`` and ``highest``; 0 stays 0.

    The gradient passes the rounding as if it were not there (DeepShift-Q, arXiv 1905.13298).
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    exponent = wide.abs().log2().round().clamp(lowest, highest)
    rounded = (wide.sign() * exponent.exp2()).to(weight.dtype)
    return weight + (rounded - weight).detach()


@use_experts_implementation
class PowerExperts(nn.Module):
    """Gated feed-forward experts, of which ``shifted`` (ids; the upper half where none are given) use powers of two.

    What is trained is ``gate_up_weight`` [E, 2I, H] and ``down_weight`` [E, H, I]; what computes, ``gate_up_proj`` and
    ``down_proj``, is made of it: unchanged for one kind, rounded for the other (ShiftAddViT's mixture of
    multiplication primitives).
    """

    def __init__(self, config: Any, site: Site, *, shifted: Sequence[int] | None = None) -> None:
        super().__init__()
        count = site.num_experts
        ids = list(range(count // 2, count)) if shifted is None else list(shifted)
        if not all(0 <= i < count for i in ids):
            raise OptionError(f"shifted={ids} of power-of-two experts: the layer has the experts 0 to {count - 1}")
        self.num_experts, self.top_k = count, site.top_k
        self.hidden_dim, self.intermediate_dim = site.hidden_size, site.intermediate_size
        self.gate_up_weight = nn.Parameter(torch.empty(count, 2 * site.intermediate_size, site.hidden_size))
        self.down_weight = nn.Parameter(torch.empty(count, site.hidden_size, site.intermediate_size))
        self.shifted = ids
        self.act_fn = ACT2FN[site.activation]

    def initialise(self, std: float) -> None:
        init.normal_(self.gate_up_weight, mean=0.0, std=std)
        init.normal_(self.down_weight, mean=0.0, std=std)

    @property
    def gate_up_proj(self) -> Tensor:
        return self._mixed(self.gate_up_weight)

    @property
    def down_proj(self) -> Tensor:
        return self._mixed(self.down_weight)

    def active_parameters(self) -> int:
        """What one token uses."""
        return self.top_k * (self.gate_up_weight.numel() + self.down_weight.numel()) // self.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], as :class:`Experts` computes it."""
        return Experts.forward(self, hidden_states, top_k_index, top_k_weights)

    def _mixed(self, weight: Tensor) -> Tensor:
        rounds = torch.zeros(self.num_experts, 1, 1, dtype=torch.bool, device=weight.device)
        rounds[self.shifted] = True
        return torch.where(rounds, power_of_two(weight), weight)
