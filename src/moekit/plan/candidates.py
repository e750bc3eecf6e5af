"""The plans worth comparing under a budget: the solver's, under several beliefs, and every single method that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moekit.algebra import alignment, assign_to_leaders
from moekit.formats import DenseBank
from moekit.plan.cost import WHOLE, Form, LayerCost, Precision
from moekit.plan.document import Plan
from moekit.plan.layer import LayerPlan
from moekit.plan.low_rank import Rank
from moekit.plan.merge import merged, redirected
from moekit.plan.solve import Point, Solution, Weights, counts_allowed, layer_plan, solve, uniform

BELIEFS = (1.0, 0.25, 4.0)
"""How much worse or better dropping may be, against rounding, than the costs say."""
SINGLE: tuple[Precision, ...] = (WHOLE, (8, 64), (8, 128), (4, 64), (4, 128), (3, 64), (2, 64))
TRIES = 8
"""Solutions at most until one fits: what headers take is only estimated while solving."""
ALIGNED_UNITS = 2048
"""Wider experts are not merged: finding the order of so many hidden units takes too long."""


@dataclass(frozen=True)
class Candidate:
    """``nbytes`` of experts and router rows; ``drop`` and ``noise`` the two parts of the predicted loss; ``calibrated``
    if its rounding was done again with calibration."""

    name: str
    plan: Plan
    nbytes: int
    drop: float
    noise: float
    measured: float | None = None
    calibrated: bool = False

    @property
    def predicted(self) -> float:
        return self.drop + self.noise

    @property
    def loss(self) -> float:
        """The measured loss where there is one; a plan of which nothing is known ranks last."""
        loss = self.predicted if self.measured is None else self.measured
        return float("inf") if math.isnan(loss) else loss


def solved(
    costs: Sequence[LayerCost],
    weights: Weights,
    rankings: Sequence[str],
    budget: int,
    source: str,
    believed: Weights | None = None,
    over: Callable[[Plan], int] = lambda plan: 0,
) -> Iterator[Candidate]:
    """The solver's plans: for each ranking, for each belief, and with no expert dropped; where one has factors, the
    best without any too. ``weights`` predict; ``believed`` (the same if None) is what the solver works with. A plan
    that turns out ``over`` the budget by some bytes is solved again in as many fewer."""
    tries = [(ranking, belief, True) for ranking in rankings[:1] for belief in BELIEFS]
    tries += [(ranking, 1.0, True) for ranking in rankings[1:]] + [(rankings[0], 1.0, False)]
    for ranking, belief, drop in tries:
        name = f"solver by {ranking}" + (f", dropping counted x{belief:g}" if belief != 1 else "")
        name = name if drop else "solver, precision only"
        believes = (believed or weights).scaled(belief)
        for low_rank in (True, False) if costs[0].ranks else (False,):
            solution = partial(solve, costs, believes, ranking, drop=drop, low_rank=low_rank)
            made = partial(candidate, name, costs=costs, weights=weights, source=source)
            one = _fitted(solution, made, budget, over)
            if one is not None:
                yield one
                if not any(layer.values for layer in one.plan.layers.values()):
                    break


def _fitted(
    solution: Callable[[int], Solution | None],
    made: Callable[[Sequence[Point]], Candidate],
    budget: int,
    over: Callable[[Plan], int],
) -> Candidate | None:
    """The solution in so many bytes, or in as many fewer as its plan turns out too large by."""
    for _ in range(TRIES):
        found = solution(budget)
        if found is None:
            return None
        one = made(tuple(found.points.values()))
        excess = over(one.plan)
        if excess <= 0:
            return one
        budget -= excess
    return None


def single_methods(
    costs: Sequence[LayerCost], weights: Weights, rankings: Sequence[str], budget: int, source: str
) -> Iterator[Candidate]:
    """For each ranking and precision, the most experts per layer, the same in all, that fit."""
    for precision in SINGLE:
        if not all(precision in cost.nbytes for cost in costs):
            continue
        for ranking in rankings:
            points = _most(costs, weights, ranking, precision, budget)
            if points is None:
                continue
            whole = all(len(p.kept) == c.site.num_experts for p, c in zip(points, costs, strict=True))
            how = "" if precision == WHOLE else f" at {named(precision)}"
            count = f"{len(points[0].kept)} of {costs[0].site.num_experts} experts by {ranking}"
            yield candidate(("all experts" if whole else count) + how, points, costs, weights, source)
            if whole:
                break


def candidate(
    name: str, points: Sequence[Point], costs: Sequence[LayerCost], weights: Weights, source: str
) -> Candidate:
    """Points as a plan, with the loss they are predicted to have."""
    drop = noise = 0.0
    layers = {}
    for point, cost in zip(points, costs, strict=True):
        site = cost.site
        gone = [e for e in range(site.num_experts) if e not in point.kept]
        drop += weights.drop[site.name] * float(cost.drop[gone].sum())
        for expert, form in zip(point.kept, point.forms, strict=True):
            lost = float(weights.of(cost, form)[expert])
            drop, noise = (drop + lost, noise) if isinstance(form, Rank) else (drop, noise + lost)
        layers[site.name] = layer_plan(point, cost, _why(point, site.num_experts, name))
    if any(layer.values for layer in layers.values()):
        name += ", with low rank"
    plan = Plan(source=source, layers=layers, methods=(f"fit: {name}",))
    return Candidate(name, plan, sum(point.nbytes for point in points), drop, noise)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each set that store the same."""
    seen: dict[object, Candidate] = {}
    for one in candidates:
        key = tuple((tuple(layer.experts), layer.values) for layer in one.plan.layers.values())
        seen.setdefault(key, one)
    return list(seen.values())


def rows_kept(one: Candidate, costs: Sequence[LayerCost], bank: Callable[[str], DenseBank]) -> Iterator[Candidate]:
    """A plan that drops experts, in two other ways of the same size: their router rows stay and call the kept expert
    of most similar routing, which is left as it is, or becomes the usage-weighted mean of all it stands for."""
    if not any(layer.dropped for layer in one.plan.layers.values()):
        return
    sent: dict[str, LayerPlan] = {}
    mixed: dict[str, LayerPlan] = {}
    for cost in costs:
        layer = one.plan.layers[cost.site.name]
        if cost.similarity is None or len(layer.sources) != len(layer.experts) or layer.values is not None:
            return
        leader_E = assign_to_leaders(cost.similarity, sorted(layer.sources))
        sent[cost.site.name] = redirected(layer, leader_E, layer.why)
        experts = bank(cost.site.name)
        if experts.intermediate_size > ALIGNED_UNITS:
            mixed = {}
            break
        orders = {
            e: alignment(experts.expert(leader), experts.expert(e)).numpy()
            for e, leader in enumerate(leader_E.tolist())
            if e != leader and cost.usage[e] > 0
        }
        made = merged(leader_E, cost.usage, orders, layer.why)
        mixed[cost.site.name] = made.with_bits([e.bits for e in layer.experts], [e.group_size for e in layer.experts])
    for how, layers in (("dropped rows sent to the most similar expert", sent), ("dropped experts merged", mixed)):
        if len(layers) == len(costs):
            name = f"{one.name}, {how}"
            plan = replace(one.plan, layers=layers, methods=(f"fit: {name}",))
            yield replace(one, name=name, plan=plan, measured=None)


def rival(name: str, plan: Plan) -> Candidate:
    """A plan of another method: nothing is predicted for it."""
    return Candidate(name, plan, 0, float("nan"), float("nan"))


def _most(
    costs: Sequence[LayerCost], weights: Weights, ranking: str, precision: Precision, budget: int
) -> list[Point] | None:
    for count in reversed(counts_allowed(costs[0])):
        if all(count in counts_allowed(cost) for cost in costs):
            points = [uniform(cost, weights, ranking, count, precision) for cost in costs]
            if sum(point.nbytes for point in points) <= budget:
                return points
    return None


def named(form: Form) -> str:
    """As a person would say it."""
    return f"rank {form.rank}" if isinstance(form, Rank) else f"{form[0]} bits in groups of {form[1]}"


def _why(point: Point, num_experts: int, name: str) -> str:
    forms = [f"rank {form.rank}" if isinstance(form, Rank) else f"{form[0]} bits" for form in point.forms]
    parts = ", ".join(f"{forms.count(form)} at {form}" for form in dict.fromkeys(forms))
    return f"{name}: keeps {len(forms)} of {num_experts} ({parts})"
