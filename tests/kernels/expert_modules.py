"""Experts modules of transformers' shared contract with any combination of its flags, tiny and random."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

EXPERTS, HIDDEN, INNER, SLOTS = 6, 12, 8, 3


@dataclass(frozen=True)
class Flags:
    transposed: bool = False
    bias: bool = False
    gated: bool = True
    concatenated: bool = True
    norm: bool = False
    limit: float | None = None


ALL_FLAGS = [
    Flags(),
    Flags(bias=True),
    Flags(transposed=True),
    Flags(gated=False),
    Flags(gated=False, bias=True, transposed=True),
    Flags(transposed=True, bias=True, concatenated=False, limit=0.5),
    Flags(norm=True),
    Flags(limit=0.3),
]


def module_class(flags: Flags) -> type[nn.Module]:
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = config.experts
            rows = 2 * config.inner if flags.gated else config.inner
            up, down = (config.experts, rows, config.hidden), (config.experts, config.hidden, config.inner)
            if flags.transposed:
                up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
            name = "gate_up_proj" if flags.gated else "up_proj"
            setattr(self, name, nn.Parameter(torch.randn(up) * 0.3))
            self.down_proj = nn.Parameter(torch.randn(down) * 0.3)
            if flags.bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(config.experts, rows) * 0.3))
                self.down_proj_bias = nn.Parameter(torch.randn(config.experts, config.hidden) * 0.3)
            if flags.norm:
                self.post_expert_norm = nn.LayerNorm(config.hidden)
            self.act_fn = nn.SiLU() if flags.gated else nn.ReLU()

        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            raise NotImplementedError

        if flags.limit is not None:

            def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
                halves = gate_up.chunk(2, -1) if flags.concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
                return self.act_fn(halves[0].clamp(max=flags.limit)) * (halves[1] + 1)

    return use_experts_implementation(
        Experts,
        is_concatenated=flags.concatenated,
        is_transposed=flags.transposed,
        has_bias=flags.bias,
        has_gate=flags.gated,
        has_post_expert_norm=flags.norm,
    )


def make(flags: Flags = Flags(), dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Any:
    torch.manual_seed(seed)
    shape = {"experts": EXPERTS, "hidden": HIDDEN, "inner": INNER, **sizes}
    config = SimpleNamespace(**shape, num_experts_per_tok=SLOTS, _experts_implementation="moekit")
    return module_class(flags)(config).to(dtype)


def batch(tokens: int, experts: int = EXPERTS, slots: int = SLOTS, hidden: int = HIDDEN, dtype=torch.float32, seed=0):
    """(x [T, H], index [T, K] without repeats, weights [T, K])."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :slots]
    return x, index, torch.rand(tokens, slots, generator=generator).to(dtype)
