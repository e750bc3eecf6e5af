"""What experiments on calibrated rounding share: how far plans move what MoE layers add, on tokens they never saw."""

from __future__ import annotations

import numpy as np

from moekit.checkpoint import Checkpoint
from moekit.compress._sample import Sample, moe_output
from moekit.plan import Plan
from moekit.plan.recombine import stored
from moekit.profile import Profile

CALIBRATED = ("hidden", "sample_expert", "sample_weight", "sample_domain", "counts")
"""Statistics a profile needs for calibrated rounding and for what it is judged by here."""


def output_error(plan: Plan, source: Checkpoint, judge: Profile) -> float:
    """``||MoE'(x) - MoE(x)||^2 / ||MoE(x)||^2`` over the sampled tokens of ``judge``, under the routing they had: mean
    over layers. Each layer is given what the source model gives it."""
    found = []
    for name, layer in plan.layers.items():
        sample, bank = Sample.of(judge.layers[name]), source.bank(name)
        wanted = moe_output(sample, bank).double()
        made = moe_output(sample, stored(bank, layer)).double()
        found.append(float((made - wanted).square().sum() / wanted.square().sum()))
    return float(np.mean(found))


def imbalance(seen: Profile) -> float:
    """Standard deviation over experts of their share of all choices, mean over layers: 0 is even use."""
    counts = [layer.total("counts") for layer in seen.layers.values()]
    return float(np.mean([(count / count.sum()).std() for count in counts]))
