"""What experiments on toy tasks share: a small network of MoE layers from parts, and the loop that trains it.

Shapes by suffix: T examples (one token each), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.contract import Context
from moekit.nn import MoE, Router, Site, Standalone, finish_step, initialise
from moekit.nn.balance import balance_term
from moekit.nn.banks import BANKS
from moekit.nn.experts import FeedForward
from moekit.nn.flow import begin, carry
from moekit.nn.parts import Spec, make

Batch = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""Inputs, targets, and fields of the context such as the task."""
Loss = Callable[[Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """``out(h + sum of layers)`` with ``h = in(x)``; a layer is anything called with (hidden, context)."""

    def __init__(self, inputs: int, size: int, outputs: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(inputs, size), nn.Linear(size, outputs)
        self.norms = nn.ModuleList(nn.RMSNorm(size) for _ in layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, x_TI: Tensor, context: Context) -> Tensor:
        hidden = self.enter(x_TI)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            hidden = hidden + layer(norm(hidden), context)
        return self.leave(hidden)


def moe(
    site: Site,
    router: Mapping[str, Spec] | None = None,
    *,
    bank: Spec = "stacked",
    balance: Mapping[str, Any] | None = None,
    shared: int = 0,
    std: float = 0.1,
) -> MoE:
    """One MoE layer of named parts, its weights drawn from torch's generator; ``shared`` is the width of an expert that
    every token passes."""
    layer = MoE(
        Router(site, router),
        make("experts", BANKS, bank, Standalone(), site),
        shared=FeedForward(site.hidden_size, shared, site.activation) if shared else None,
        balance={name: balance_term(name, spec, site) for name, spec in (balance or {}).items()},
    )
    initialise(layer, std)
    return layer


def context_of(x_TI: Tensor, fields: Mapping[str, Tensor] | None = None) -> Context:
    return begin(1, len(x_TI), x_TI.device, **(fields or {}))


def fit(
    model: nn.Module,
    draw: Callable[[int], Batch],
    steps: int,
    rate: float,
    loss: Loss = nn.functional.mse_loss,
    fast: Mapping[str, float] | None = None,
) -> None:
    """Train in place with AdamW (decay 0.01, none where a parameter's name has a part that ``fast`` gives a rate)."""
    fast = fast or {}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        own = next((value for part, value in fast.items() if part in name), rate)
        groups.setdefault(own, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr": own, "weight_decay": 0.01 if own == rate else 0.0} for own, p in groups.items()]
    )
    model.train()
    for step in range(steps):
        x, wanted, fields = draw(step)
        context = context_of(x, fields)
        value = loss(model(x, context), wanted)
        optimizer.zero_grad()
        (value + sum(carry(context).losses.values())).backward()
        optimizer.step()
        finish_step(model)
    model.eval()


@torch.no_grad()
def answers(model: nn.Module, x_TI: Tensor, fields: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Context]:
    """(outputs [T, O], the context after the pass)."""
    context = context_of(x_TI, fields)
    return model.eval()(x_TI, context), context


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
