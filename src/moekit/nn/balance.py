"""Auxiliary terms that keep routers healthy: each a number computed from what one layer routed.

Shapes by suffix: T tokens, E choices, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .costs import Cost
from .coupling import Coupling
from .information import Concentration, MutualInformation, Tsallis
from .load import KindLoad, Load, SoftLoad
from .parts import Site, fits, make
from .permutation import PermutationEntropy
from .seen import Seen, variation
from .similarity import Similarity
from .subspace import Conflict, Connections
from .tree import LeafEntropy


class ZLoss(nn.Module):
    """The mean over tokens of ``logsumexp(logits)^2``: keeps logits small (ST-MoE, equation 5)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        return seen.mean(seen.logits_TE.logsumexp(-1, keepdim=True).square()).sum()


class Entropy(nn.Module):
    """The mean over tokens of the entropy of the softmax over all choices, in nats: minimising it sharpens."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        log = seen.logits_TE.log_softmax(-1)
        return -seen.mean((seen.probability_TE * log.masked_fill(log == -torch.inf, 0)).sum(-1, keepdim=True)).sum()


class Importance(nn.Module):
    """The squared coefficient of variation of the experts' summed probabilities (Shazeer 2017, equation 6)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        return variation(seen.mean(seen.probability_TE)[seen.candidates_E])


BALANCES: dict[str, Callable[..., Any]] = {
    "load": Load,
    "kind-load": KindLoad,
    "soft-load": SoftLoad,
    "z": ZLoss,
    "entropy": Entropy,
    "tsallis": Tsallis,
    "importance": Importance,
    "mutual-information": MutualInformation,
    "concentration": Concentration,
    "coupling": Coupling,
    "similarity": Similarity,
    "cost": Cost,
    "conflict": Conflict,
    "connections": Connections,
    "leaf-entropy": LeafEntropy,
    "permutation-entropy": PermutationEntropy,
}
"""By the name a configuration gives; called with :class:`Seen`, returns a number that is minimised."""


def balance_term(name: str, spec: Mapping[str, Any] | float, site: Site) -> tuple[float, nn.Module]:
    """(weight, term): a number is the weight alone; ``kind`` is the name unless it says otherwise."""
    options = dict(spec) if isinstance(spec, Mapping) else {"weight": spec}
    weight = options.pop("weight", None)
    if weight is None or not fits(weight, float):
        raise OptionError(f"balance {name!r} needs a weight: {name} = 0.01, or {name} = {{weight = 0.01, ...}}")
    return float(weight), make("balance", BALANCES, {"kind": name, **options}, site)
