"""Experts that are feature-wise modulations of one shared base: a scale and a shift each (FiLM).

Shapes by suffix: T tokens, M tokens of one expert, H hidden size, E experts, K slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..errors import OptionError
from .parts import Site

FORMS = ("linear", "vector")


class ModulatedExperts(nn.Module):
    """``adaptor(sum_i w_i (a_i(z) z + b_i(z)))`` with the base ``z = gelu(A n) (B n)``, ``n = norm(x)``, of all tokens.

    Deweather MoE (MoFME): ``a_i`` and ``b_i`` are "linear" functions of z (2 H^2 parameters an expert), or of the form
    "vector" they are constant (2 H). The base and the adaptor (H to ``width`` to H; the layer's intermediate size where
    none is given) are computed once per token, whatever k is. Runs expert by expert, on no kernel of its own.
    """

    def __init__(self, config: Any, site: Site, *, form: str = "linear", width: int | None = None) -> None:
        super().__init__()
        if form not in FORMS:
            raise OptionError(f"form={form!r} of modulated experts: choose one of {', '.join(FORMS)}")
        size, wide = site.hidden_size, site.intermediate_size if width is None else width
        if wide < 1:
            raise OptionError(f"width={wide} of an adaptor: give 1 or more")
        self.num_experts, self.top_k = site.num_experts, site.top_k
        self.norm = nn.LayerNorm(size)
        self.base_gate, self.base_up = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        linear = form == "linear"
        self.modulation = nn.Parameter(torch.empty(site.num_experts, 2 * size, size)) if linear else None
        self.modulation_bias = nn.Parameter(torch.empty(site.num_experts, 2 * size))
        self.adaptor_up, self.adaptor_down = nn.Linear(size, wide, bias=False), nn.Linear(wide, size, bias=False)

    def initialise(self, std: float) -> None:
        """Scales start around 1 and shifts around 0: every expert begins near the base itself."""
        start = torch.zeros_like(self.modulation_bias)
        start[:, : start.shape[1] // 2] = 1
        init.copy_(self.modulation_bias, start)
        if self.modulation is None:
            init.copy_(self.modulation_bias, start + torch.randn_like(start) * std)
        else:
            init.normal_(self.modulation, mean=0.0, std=std)

    def active_parameters(self) -> int:
        """What one token uses: the shared parts once, modulations k times."""
        own = sum(p.numel() for p in (self.modulation, self.modulation_bias) if p is not None)
        return sum(p.numel() for p in self.parameters()) - own + self.top_k * own // self.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H]; the id E marks an unused slot."""
        normed = self.norm(hidden_states)
        base_TH = F.gelu(self.base_gate(normed)) * self.base_up(normed)
        mixed_TH = torch.zeros_like(base_TH)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if len(token):
                rows = self.modulated(expert, base_TH[token]) * top_k_weights[token, slot, None]
                mixed_TH = mixed_TH.index_add(0, token, rows.to(mixed_TH.dtype))
        return self.adaptor_down(F.gelu(self.adaptor_up(mixed_TH)))

    def modulated(self, expert: int, base_MH: Tensor) -> Tensor:
        """[M, H]: the base as one expert sees it."""
        both = self.modulation_bias[expert]
        if self.modulation is not None:
            both = F.linear(base_MH, self.modulation[expert], both)
        scale, shift = both.chunk(2, dim=-1)
        return scale * base_MH + shift
