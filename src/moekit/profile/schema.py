"""What a profile may hold: the name of every statistic, the axes of its array, and what its numbers mean.

The one table that observing, merging, saving and the documentation share. Axes by letter: h half, d domain, p phase,
e expert of this layer, f expert of the MoE layer before it, i hidden unit, s sampled token, t traced token, k slot,
b bin of a histogram, m module that every token passes.
"""

from __future__ import annotations

from dataclasses import dataclass

HALVES = 2
"""Sequences are dealt in turn to two halves, so that every figure has a second, independent one to be held against."""
PHASES = ("prefill", "decode")
RATIO_BINS = 200
"""Bins of equal width in 0..1 for the ratio of two combine weights."""


@dataclass(frozen=True)
class Field:
    """``axes`` by letter (see the module's text); ``merge`` is "sum", "max" or "rows" (chosen rows, in order)."""

    axes: str
    meaning: str
    merge: str = "sum"
    default: bool = True


FIELDS: dict[str, Field] = {
    "tokens": Field("hdp", "tokens seen, padding not counted"),
    "counts": Field("hdpe", "(token, slot) pairs the expert received"),
    "probability": Field("hdpe", "softmax over all E router logits, summed over all tokens"),
    "selected_probability": Field("hdpe", "the same softmax, of the tokens that chose the expert alone"),
    "strong_logit": Field("hdpe", "router logit of the tokens whose largest it is, 0 for all others"),
    "weight": Field("hdpe", "final combine weight of the tokens that chose the expert"),
    "output_norm": Field("hdpe", "L2 norm of the expert's unweighted output"),
    "gate_norm": Field("hdpe", "combine weight x output norm"),
    "contribution": Field("hdpe", "token contribution max(0, 1 - cos(h, h + R)) x combine weight x output norm"),
    "output_energy": Field("hdpe", "combine weight^2 x output norm^2"),
    "entropy": Field("hdp", "entropy of the softmax over router logits, in nats"),
    "weight_ratio": Field("hdpb", "tokens by second largest over largest combine weight, in bins of 0..1"),
    "residual_energy": Field("hdp", "squared L2 norm of the residual stream entering the block"),
    "max_abs_down": Field("e", "largest absolute value of the down projection's unweighted output", merge="max"),
    "max_abs_shared": Field("m", "the same of each shared expert's output", merge="max", default=False),
    "coactivation": Field("ee", "tokens that chose both experts; the diagonal is the number that chose the one"),
    "transition": Field("fe", "tokens that chose f in the MoE layer before and e in this one"),
    "logit_gram": Field("ee", "sum over tokens of the outer product of the router logits"),
    "input_moments": Field("ii", "sum over tokens of the outer product of the experts' input", default=False),
    "expert_moments": Field("eii", "the same over each expert's own tokens", default=False),
    "hidden": Field("si", "inputs of the experts at the sampled tokens", merge="rows"),
    "sample_expert": Field("sk", "experts of the sampled tokens, -1 where a slot is unused", merge="rows"),
    "sample_weight": Field("sk", "their combine weights", merge="rows"),
    "sample_logits": Field("se", "router logits of the sampled tokens", merge="rows"),
    "sample_domain": Field("s", "domains of the sampled tokens, as index into the profile's domains", merge="rows"),
    "sample_priority": Field("s", "their priorities: which tokens a sample keeps", merge="rows"),
    "trace_expert": Field("tk", "experts of the traced tokens, -1 where a slot is unused", merge="rows"),
    "trace_weight": Field("tk", "their combine weights", merge="rows"),
}
"""Statistic name -> what its array is. All sums are float64; samples and traces keep the width they were seen in."""

DEFAULT = tuple(name for name, field in FIELDS.items() if field.default)
ALWAYS = ("tokens", "counts")
"""Without these no other figure can be read."""
SAMPLE_KEYS = ("sample_expert", "sample_domain", "sample_priority")
"""What decides which tokens are sampled: kept with any other statistic of the sample."""
