"""Which stock family has the same arithmetic as a plain description of a decoder, and what it calls the tensors.

Every family here has rotary attention over grouped heads, RMS norms before each sublayer and gated experts. They differ
in the few traits of :class:`Architecture`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Glm4MoeConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.dots1.configuration_dots1 import Dots1Config

from moekit.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """``sizes``: fields that all families call alike. ``scores``: "softmax" or "sigmoid"; ``normalise``: weights of the
    chosen sum to 1, then times ``scale``; ``corrected``: a bias moves the choice alone; ``shared_size``: width of the
    shared expert, 0 for none; ``dense_layers``: layers without experts, ``dense_size`` wide; tokens choose from
    ``groups_kept`` of ``groups`` of experts, those with the two best."""

    sizes: dict[str, Any]
    num_experts: int
    top_k: int
    expert_size: int
    qk_norm: bool
    scores: str
    normalise: bool
    scale: float
    corrected: bool
    shared_size: int
    dense_layers: tuple[int, ...]
    dense_size: int
    groups: int = 1
    groups_kept: int = 1


@dataclass(frozen=True)
class Sibling:
    """A stock configuration; ``gate``, ``bias`` and ``shared`` are its names under ``mlp.`` (None: it has none)."""

    config: PreTrainedConfig
    gate: str = "gate.weight"
    bias: str | None = None
    shared: str | None = None


def _plain(a: Architecture) -> Sibling | str:
    if a.qk_norm or a.scores != "softmax" or not a.normalise:
        return "has no norm of queries and keys, and softmax weights that sum to 1"
    if a.corrected or a.shared_size or a.dense_layers or a.groups > 1:
        return "has no bias of the choice, no groups, no shared expert and no dense layer"
    config = MixtralConfig(
        **a.sizes,
        num_local_experts=a.num_experts,
        num_experts_per_tok=a.top_k,
        intermediate_size=a.expert_size,
        sliding_window=None,
    )
    return Sibling(config)


def _normed(a: Architecture) -> Sibling | str:
    if not a.qk_norm or a.scores != "softmax" or a.scale != 1:
        return "norms queries and keys, and has softmax weights without a scale"
    if a.corrected or a.shared_size or a.groups > 1:
        return "has no bias of the choice, no groups and no shared expert"
    config = Qwen3MoeConfig(
        **a.sizes,
        num_experts=a.num_experts,
        num_experts_per_tok=a.top_k,
        moe_intermediate_size=a.expert_size,
        intermediate_size=a.dense_size,
        norm_topk_prob=a.normalise,
        mlp_only_layers=list(a.dense_layers),
    )
    return Sibling(config)


def _corrected(a: Architecture) -> Sibling | str:
    if a.scores != "sigmoid" or not a.shared_size or a.shared_size % a.expert_size:
        return "has sigmoid scores, and shared experts as wide as a number of its experts"
    if a.dense_layers != tuple(range(len(a.dense_layers))):
        return "has dense layers at the beginning only"
    if a.num_experts // a.groups < 2:
        return "ranks groups by their two best experts"
    common = {
        **a.sizes,
        "n_routed_experts": a.num_experts,
        "num_experts_per_tok": a.top_k,
        "moe_intermediate_size": a.expert_size,
        "intermediate_size": a.dense_size,
        "n_shared_experts": a.shared_size // a.expert_size,
        "norm_topk_prob": a.normalise,
        "routed_scaling_factor": a.scale,
        "first_k_dense_replace": len(a.dense_layers),
        "n_group": a.groups,
        "topk_group": a.groups_kept,
    }
    if a.qk_norm:
        config: PreTrainedConfig = Dots1Config(**common, sliding_window=None)
    else:
        rope = {**(a.sizes.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0})}
        common["rope_parameters"] = {**rope, "partial_rotary_factor": 1.0}
        config = Glm4MoeConfig(**common, use_qk_norm=False)
    return Sibling(config, bias="gate.e_score_correction_bias", shared="shared_experts")


FAMILIES: dict[str, Callable[[Architecture], Sibling | str]] = {
    "mixtral": _plain,
    "qwen3_moe": _normed,
    "dots1 or glm4_moe": _corrected,
}
"""By name: the sibling, or what the family is like instead."""


def sibling(architecture: Architecture) -> Sibling:
    """The stock family that computes the same.

    Raises:
        UnsupportedModelError: none does; it says what each would want.
    """
    reasons = []
    for name, candidate in FAMILIES.items():
        found = candidate(architecture)
        if isinstance(found, Sibling):
            return found
        reasons.append(f"{name} {found}")
    raise UnsupportedModelError(f"no stock family computes this model: {'; '.join(reasons)}")
