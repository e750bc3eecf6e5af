"""How many nats a unit of disturbance costs in each layer: by disturbing a few layers at a time and measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from moekit.plan.candidates import Candidate
from moekit.plan.cost import LayerCost, Precision
from moekit.plan.document import Plan
from moekit.plan.planner import Evaluate
from moekit.plan.solve import Point, Weights, counts_allowed, layer_plan, uniform

PROBE: Precision = (3, 64)
"""Coarse enough that the effect stands clear of noise, fine enough to stay small."""


DROP_NATS, NOISE_NATS = 0.5, 0.125
"""Nats per unit of disturbance from dropping and from rounding, for a model that cannot be run: about what the middle
layers of the embedded model show. Rounding's errors are small and many, and cancel where a dropped output does not."""


def typical_weights(costs: Sequence[LayerCost]) -> Weights:
    """Every layer alike: without a model to measure."""
    names = [cost.site.name for cost in costs]
    return Weights(dict.fromkeys(names, DROP_NATS), dict.fromkeys(names, NOISE_NATS))


def unit_weights(costs: Sequence[LayerCost]) -> Weights:
    """Losses in units of disturbance."""
    names = [cost.site.name for cost in costs]
    return Weights(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))


def calibrated(costs: Sequence[LayerCost], source: str, ranking: str, evaluate: Evaluate, segments: int = 8) -> Weights:
    """Two probes for each of at most ``segments`` runs of consecutive layers: half of the experts dropped, and all of
    them rounded to ``PROBE``. The layers of one run share what is found."""
    unit = unit_weights(costs)
    drop: dict[str, float] = {}
    noise: dict[str, float] = {}
    for run in _runs(costs, segments):
        halves = {c.site.name: uniform(c, unit, ranking, _half(c)) for c in run}
        rounded = {c.site.name: uniform(c, unit, ranking, c.site.num_experts, _probe(c)) for c in run}
        drop |= _nats(run, halves, source, evaluate)
        noise |= _nats(run, rounded, source, evaluate)
    return Weights(_filled(drop), _filled(noise))


def rescaled(weights: Weights, judged: Sequence[Candidate]) -> Weights:
    """The weights times the two factors (dropping, rounding) that best turn the predictions into the measurements,
    in relative terms: effects of many layers together are not quite the sum of each alone."""
    known = [one for one in judged if one.measured and one.measured > 0 and math.isfinite(one.predicted)]
    if len(known) < 2:
        return weights
    parts = np.array([[one.drop / (one.measured or 1), one.noise / (one.measured or 1)] for one in known])
    (drop, noise), _ = nnls(parts, np.ones(len(known)))
    if drop <= 0 or noise <= 0:
        return weights
    return Weights(_times(weights.drop, drop), _times(weights.noise, noise))


def _times(values: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: value * float(factor) for name, value in values.items()}


def _filled(found: Mapping[str, float]) -> dict[str, float]:
    """Layers whose probe disturbed nothing take the median of the others."""
    known = [value for value in found.values() if value > 0]
    middle = float(np.median(known)) if known else 1.0
    return {name: value if value > 0 else middle for name, value in found.items()}


def best_ranking(costs: Sequence[LayerCost], source: str, evaluate: Evaluate | None) -> list[str]:
    """The rankings all layers have, best first: by the loss when half of the experts go. In their own order if there
    is nothing to measure with."""
    names = [name for name in costs[0].scores if all(name in cost.scores for cost in costs)]
    if evaluate is None:
        return names
    unit = unit_weights(costs)
    plans = {n: as_plan({c.site.name: uniform(c, unit, n, _half(c)) for c in costs}, costs, source, n) for n in names}
    measured: dict[str, float] = {}
    for name, plan in plans.items():
        twin = next((other for other in measured if plans[other].layers == plan.layers), None)
        measured[name] = evaluate(plan) if twin is None else measured[twin]
    return sorted(names, key=lambda name: measured[name])


def as_plan(points: Mapping[str, Point], costs: Sequence[LayerCost], source: str, why: str) -> Plan:
    """Points as a plan of the layers they are for."""
    layers = {c.site.name: layer_plan(points[c.site.name], c, "") for c in costs if c.site.name in points}
    return Plan(source=source, layers=layers, methods=(why,))


def _nats(run: Sequence[LayerCost], points: Mapping[str, Point], source: str, evaluate: Evaluate) -> dict[str, float]:
    disturbance = sum(point.loss for point in points.values())
    measured = evaluate(as_plan(points, run, source, "probe"))
    return dict.fromkeys(points, measured / disturbance if disturbance > 0 else 0.0)


def _runs(costs: Sequence[LayerCost], segments: int) -> list[Sequence[LayerCost]]:
    size = -(-len(costs) // segments)
    return [costs[start : start + size] for start in range(0, len(costs), size)]


def _half(cost: LayerCost) -> int:
    allowed = counts_allowed(cost)
    return min(allowed, key=lambda count: abs(count - cost.site.num_experts / 2))


def _probe(cost: LayerCost) -> Precision:
    return min(cost.precisions, key=lambda p: (abs(p[0] - PROBE[0]), abs(p[1] - PROBE[1])))
