"""The first stage of a router: logits [T, E] from hidden states [T, H].

Shapes by suffix: T tokens, H hidden size, E choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..contract import Context
from ..errors import OptionError
from .calibrated import Calibrated
from .given import Given, Hash, Offered
from .parts import Site
from .permutation import Permuted
from .product_keys import ProductKeyScorer
from .recurrent import Recurrent, Residual
from .task_aware import TaskAware
from .tree import Tree


class Linear(nn.Module):
    """``x W^T``, with ``bias`` added where asked; ``frozen`` leaves it at its random start (SMoE-Dropout).

    What is frozen is kept in buffers: saved like a weight, and nothing that trains parameters can reach it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, site: Site, *, bias: bool = False, frozen: bool = False) -> None:
        super().__init__()
        start: dict[str, Tensor | None] = {"weight": torch.zeros(site.choices, site.hidden_size)}
        start["bias"] = torch.zeros(site.choices) if bias else None
        for name, value in start.items():
            if frozen or value is None:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        return F.linear(x_TH, self.weight, self.bias)


class MLP(nn.Module):
    """``W2 f(W1 x)`` through ``width`` units (ModuleFormer: 256 and GELU)."""

    def __init__(self, site: Site, *, width: int = 256, activation: str = "gelu") -> None:
        super().__init__()
        if width < 1:
            raise OptionError(f"width={width} of an MLP that scores: give 1 or more")
        if activation not in ACT2FN:
            raise OptionError(f"activation={activation!r} of an MLP that scores: choose one that transformers knows")
        self.inner = nn.Linear(site.hidden_size, width, bias=False)
        self.act_fn = ACT2FN[activation]
        self.weight = nn.Parameter(torch.zeros(site.choices, width))

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        return F.linear(self.act_fn(self.inner(x_TH)), self.weight)


class Cosine(nn.Module):
    """``cos(x, w_e) / temperature`` with the temperature learnt (X-MoE).

    Raises :class:`OptionError` for a ``temperature`` to start from that is not positive.
    """

    def __init__(self, site: Site, *, temperature: float = 0.3) -> None:
        super().__init__()
        if not temperature > 0:
            raise OptionError(f"temperature={temperature:g} of a cosine must be positive")
        self.weight = nn.Parameter(torch.zeros(site.choices, site.hidden_size))
        self.start = temperature
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        init.constant_(self.temperature, self.start)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        return F.linear(F.normalize(x_TH, dim=-1), F.normalize(self.weight, dim=-1)) / self.temperature


SCORERS: dict[str, Callable[..., Any]] = {
    "linear": Linear,
    "mlp": MLP,
    "cosine": Cosine,
    "recurrent": Recurrent,
    "residual": Residual,
    "tree": Tree,
    "permuted": Permuted,
    "given": Given,
    "calibrated": Calibrated,
    "task-aware": TaskAware,
    "offered": Offered,
    "hash": Hash,
    "product-key": ProductKeyScorer,
}
"""By the name a configuration gives. A scorer is called with (x_TH, context); ``initialise(std)`` sets its own
parameters; what it keeps for the next layer goes into ``flow.carry(context).state``."""
