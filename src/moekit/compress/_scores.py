"""How much each expert of a layer matters, as arrays [E]: higher is kept longer.

Every score is a sum the profile holds, or a ratio of two. Shapes by suffix: E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moekit.profile import LayerProfile


def summed(layer: LayerProfile, statistic: str, domains: Sequence[str] = ()) -> np.ndarray:
    """Sum over tokens of the named domains (all if none are named), whatever their phase."""
    return layer.total(statistic, domains or None)


def per_token(layer: LayerProfile, statistic: str, domains: Sequence[str] = ()) -> np.ndarray:
    """Mean over the tokens that chose the expert; zero for an expert that nobody chose."""
    return np.nan_to_num(layer.per_token(statistic, domains or None))


def balanced(layer: LayerProfile, statistic: str, domains: Sequence[str]) -> np.ndarray:
    """Sum over domains of each domain's scores scaled to sum to 1: no domain outweighs another by having more text."""
    score_E = np.zeros(layer.num_experts)
    for domain in domains:
        one_E = layer.total(statistic, [domain])
        if one_E.sum() > 0:
            score_E += one_E / one_E.sum()
    return score_E
