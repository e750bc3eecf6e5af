"""How much each expert of a layer matters, as arrays [E]: higher is kept longer.

Every score is a sum the profile holds, or a ratio of two; :data:`SCORES` names them all, with what they need. Which
experts must stay whatever they score is here too. Shapes by suffix: E experts, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moekit.errors import OptionError, ProfileError

if TYPE_CHECKING:
    from moekit.profile import LayerProfile

Of = Callable[["LayerProfile", Sequence[str]], np.ndarray]
"""A score of one layer, over the named domains (all if none are named)."""


def summed(layer: LayerProfile, statistic: str, domains: Sequence[str] = ()) -> np.ndarray:
    """Sum over tokens of the named domains (all if none are named), whatever their phase."""
    return layer.total(statistic, domains or None)


def per_token(layer: LayerProfile, statistic: str, domains: Sequence[str] = ()) -> np.ndarray:
    """Mean over the tokens that chose the expert; zero for an expert that nobody chose."""
    return np.nan_to_num(layer.per_token(statistic, domains or None))


def tcess(
    layer: LayerProfile, domains: Sequence[str] = (), *, strongest: int = 1, threshold: float = 0.0
) -> np.ndarray:
    """PreMoe's task-conditioned score: mean over tokens of an expert's raw logit where it is among the ``strongest``.

    Of each token's strongest logits, those count whose softmax among them is at least ``threshold``; everything else
    counts 0. With one (the released setting) this is over all tokens, else over the sampled ones. Faithfully, a winner
    whose logits are negative scores below an expert that never wins. In the first MoE layer this is the vector that
    PreMoe stores and looks tasks up by. Raises OptionError and ProfileError for settings or domains out of range.
    """
    if not 1 <= strongest <= layer.num_experts:
        raise OptionError(f"strongest={strongest} of {layer.num_experts} router logits: give 1 to {layer.num_experts}")
    if not threshold <= 1:
        raise OptionError(f"threshold={threshold} is above every share of a softmax: give at most 1")
    if strongest == 1:
        return layer.share("strong_logit", domains or None)
    logits_SE = layer.sample_logits[layer.sample_rows(domains)].astype(np.float64)
    if not len(logits_SE):
        raise ProfileError(f"layer {layer.name} has no sampled tokens to work with: profile again with more")
    expert_SK = np.argsort(-logits_SE, axis=1, kind="stable")[:, :strongest]
    strong_SK = np.take_along_axis(logits_SE, expert_SK, axis=1)
    share_SK = np.exp(strong_SK - strong_SK.max(axis=1, keepdims=True))
    share_SK /= share_SK.sum(axis=1, keepdims=True)
    total_E = np.zeros(layer.num_experts)
    np.add.at(total_E, expert_SK, np.where(share_SK >= threshold, strong_SK, 0.0))
    return total_E / len(logits_SE)


@dataclass(frozen=True)
class Score:
    """``needs``: statistics of the profile; ``why``: completes "keeps 4 of 8 by ..."."""

    of: Of
    needs: frozenset[str]
    why: str


def _sum(statistic: str, why: str) -> Score:
    return Score(lambda layer, domains: summed(layer, statistic, domains), frozenset({statistic}), why)


SCORES: Mapping[str, Score] = {
    "frequency": _sum("counts", "how often they are chosen"),
    "router-probability": _sum("probability", "the probability the router gives them"),
    "selected-probability": _sum("selected_probability", "the probability they are chosen with"),
    "combine-weight": _sum("weight", "their combine weights"),
    "gate-norm": Score(
        lambda layer, domains: per_token(layer, "gate_norm", domains),
        frozenset({"counts", "gate_norm"}),
        "their mean weighted output norm",
    ),
    "contribution": _sum("contribution", "gate x output norm x token contribution"),
    "tcess": Score(tcess, frozenset({"tokens", "strong_logit"}), "the router logits they win with"),
}


def mixed(of: Callable[[Sequence[str]], np.ndarray], domains: Sequence[str]) -> np.ndarray:
    """Sum over domains of each domain's own scores, scaled by :func:`shares`: no domain outweighs another by having
    more text."""
    return np.sum([shares(of([domain])) for domain in domains], axis=0)


def balanced(layer: LayerProfile, statistic: str, domains: Sequence[str]) -> np.ndarray:
    """:func:`mixed` over the domains' sums of a statistic."""
    return mixed(partial(summed, layer, statistic), domains)


def shares(score_E: np.ndarray) -> np.ndarray:
    """Scores scaled to a total (of magnitudes) of 1, so that layers or domains compare; zeros where all are."""
    total = float(np.abs(score_E).sum())
    return score_E / total if total > 0 else np.zeros(len(score_E))


def super_experts(
    layers: Mapping[str, LayerProfile], *, depth: float = 0.75, percentile: float = 99.5, ratio: float = 0.1
) -> dict[str, tuple[int, ...]]:
    """Layer -> the few experts whose outputs hold extreme values: to be passed as ``protected`` to any selection.

    An expert is one if its largest absolute output exceeds the ``percentile`` of all experts' and ``ratio`` of the
    largest, over the first ``depth`` of the layers (later ones have large outputs for another reason). Experts that no
    token chose count with 0; shared experts count where ``max_abs_shared`` was observed, and number m is -1 - m. Layers
    without any are left out. Super Experts (n 7); ``ratio`` is the paper's, whose code rounds it down.
    """
    end = round(depth * (1 + max((layer.layer for layer in layers.values()), default=0)))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, layer in layers.items():
        if layer.layer < end:
            shared = layer.arrays.get("max_abs_shared", np.zeros(0))
            ids = np.concatenate([np.arange(layer.num_experts), -1 - np.arange(len(shared))])
            found[name] = ids, np.concatenate([layer.max_abs_down, shared])
    everyone = np.concatenate([largest for _, largest in found.values()]) if found else np.zeros(1)
    bar = max(float(np.percentile(everyone, percentile)), ratio * float(everyone.max()))
    named = {name: tuple(ids[largest > bar].tolist()) for name, (ids, largest) in found.items()}
    return {name: experts for name, experts in named.items() if experts}
