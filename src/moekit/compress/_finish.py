"""A plan that rounds, rounded with calibration: the same experts at the same widths, to points that disturb less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from moekit.compress._calibrated import Feedback, packed
from moekit.compress._sample import NEEDS, Sample
from moekit.plan import values
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.recombine import recombined

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import LayerProfile, Profile

LEAST_TOKENS = 256
"""Sampled tokens per layer below which calibration would fit noise."""


def calibratable(profile: Profile) -> bool:
    """Whether a profile has what :func:`calibrated` needs of every layer."""
    layers = profile.layers.values()
    return all(set(layer.arrays) >= NEEDS and len(layer.hidden) >= LEAST_TOKENS for layer in layers)


def finishes(source: Checkpoint, profile: Profile) -> dict[str, Callable[[Plan], Plan]]:
    """The ways of rounding with calibration that ``fit`` tries, by name; none where the profile holds too little."""
    if not calibratable(profile):
        return {}
    weighed = partial(calibrated, source=source, profile=profile, feedback=Feedback(weighted=True))
    return {
        "rounded with calibration": partial(calibrated, source=source, profile=profile),
        "rounded with calibration by combine weight": weighed,
    }


def calibrated(plan: Plan, source: Checkpoint, profile: Profile, feedback: Feedback | None = None) -> Plan:
    """``plan`` with GPTQ (:mod:`moekit.algebra.gptq`) in place of rounding to nearest; as large to the byte.

    Layers whose values were computed already, and experts that are not rounded, stay as they are.
    """
    seen, how = profile.layers, feedback or Feedback()
    layers = {name: _layer(name, layer, source, seen.get(name), how) for name, layer in plan.layers.items()}
    return replace(plan, layers=layers, profile=profile.fingerprint)


def _layer(name: str, layer: LayerPlan, source: Checkpoint, seen: LayerProfile | None, feedback: Feedback) -> LayerPlan:
    bits = [expert.bits for expert in layer.experts]
    if seen is None or layer.values is not None or set(bits) == {16}:
        return layer
    bank = recombined(source.bank(name), layer)
    sizes = [expert.group_size for expert in layer.experts]
    made, notes = packed(Sample.of(seen.recombined(layer)), bank, bits, sizes, feedback=feedback)
    whole = replace(layer, experts=tuple(replace(expert, bits=16, group_size=64) for expert in layer.experts))
    return whole.valued(values.keep(made), notes)
