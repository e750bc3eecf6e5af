"""The budget solver: which experts of each layer live on, and at what precision, to lose least in a number of bytes.

Within a layer, experts stand in the order of a ranking, and any number of the first may be kept, each at any precision
or, in a layer of factors, at any rank. For every such number the best totals of bytes and loss are found exactly; they
are the layer's menu, and one choice per layer under the budget is the same problem again. Both are solved by
``algebra.allocate``.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moekit.algebra.allocate import Frontier, allocate, frontiers, trace
from moekit.plan import values
from moekit.plan.cost import WHOLE, Form, LayerCost
from moekit.plan.layer import LayerPlan
from moekit.plan.low_rank import Rank, factored

MENU = 128
"""Points of a layer's menu; where there are more, the ones that bend its curve least are left out."""
STATES, INNER_STATES = 6_000, 1_500
"""Totals kept while layers, and the experts of one layer, are combined; see ``algebra.allocate``."""


@dataclass(frozen=True)
class Weights:
    """Nats that one unit of disturbance costs, by layer name: from dropping, and from rounding."""

    drop: Mapping[str, float]
    noise: Mapping[str, float]

    def scaled(self, drop: float) -> Weights:
        return Weights({name: value * drop for name, value in self.drop.items()}, self.noise)

    def of(self, cost: LayerCost, form: Form) -> np.ndarray:
        """Nats [E] that each expert costs in a form: what a rank leaves out weighs as what is dropped."""
        rate = self.drop if isinstance(form, Rank) else self.noise
        return rate[cost.site.name] * cost.noise[form]


@dataclass(frozen=True)
class Point:
    """One way to store a layer: the experts kept, in the order of the ranking, each in a form."""

    nbytes: int
    loss: float
    kept: tuple[int, ...]
    forms: tuple[Form, ...]


@dataclass(frozen=True)
class Solution:
    """One point per layer, the totals, and the Pareto curve of (bytes of all experts and router rows, loss), thinned to
    ``MENU`` points."""

    points: Mapping[str, Point]
    nbytes: int
    loss: float
    curve: tuple[tuple[int, float], ...]
    exact: bool


def solve(
    costs: Sequence[LayerCost], weights: Weights, ranking: str, budget: int, *, drop: bool = True, low_rank: bool = True
) -> Solution | None:
    """The least loss in ``budget`` bytes for experts and router rows; None where even the least bytes are too many.
    Without ``drop`` every expert is kept, without ``low_rank`` none becomes factors."""
    menus = [layer_menu(cost, weights, ranking, drop=drop, low_rank=low_rank) for cost in costs]
    found = allocate([[(p.nbytes, p.loss) for p in menu] for menu in menus], budget, STATES)
    if found is None:
        return None
    points = {c.site.name: menu[i] for c, menu, i in zip(costs, menus, found.choice, strict=True)}
    sizes, losses = (np.array(axis) for axis in zip(*found.curve, strict=True))
    curve = tuple(found.curve[i] for i in _bends(sizes, losses))
    return Solution(points, found.nbytes, found.loss, curve, found.exact)


def smallest(costs: Sequence[LayerCost]) -> int:
    """The least bytes that experts and router rows can take: the fewest experts at the lowest precision."""
    return sum(counts_allowed(cost)[0] * (min(cost.nbytes.values()) + cost.row_nbytes) for cost in costs)


def layer_menu(
    cost: LayerCost, weights: Weights, ranking: str, *, drop: bool = True, low_rank: bool = True
) -> list[Point]:
    """Every way to store one layer that no other beats in both bytes and loss, thinned to ``MENU``: as integers and
    whole experts, or as factors and whole experts."""
    found = _points(cost, weights, ranking, cost.precisions, drop)
    if cost.ranks and low_rank:
        found += _points(cost, weights, ranking, (WHOLE, *cost.ranks), drop)
    bends = _bends(np.array([point.nbytes for point in found]), np.array([point.loss for point in found]))
    return [found[index] for index in bends]


def _points(cost: LayerCost, weights: Weights, ranking: str, forms: Sequence[Form], drop: bool) -> list[Point]:
    """The same where experts are stored in these forms only."""
    site, order = cost.site, in_order(cost, ranking)
    nats = {form: weights.of(cost, form) for form in forms}
    items = [[(cost.nbytes[f] + cost.row_nbytes, float(nats[f][e])) for f in forms] for e in order]
    path: list[Frontier] = list(frontiers(items, INNER_STATES))
    counts = counts_allowed(cost) if drop else [site.num_experts]
    lost = np.append(np.cumsum(weights.drop[site.name] * cost.drop[list(order[::-1])])[::-1], 0.0)
    nbytes = np.concatenate([path[m - 1].nbytes for m in counts])
    loss = np.concatenate([path[m - 1].loss + lost[m] for m in counts])
    where = [(m, state) for m in counts for state in range(len(path[m - 1].nbytes))]
    points = []
    for index in _bends(nbytes, loss):
        m, state = where[index]
        chosen = trace(path[:m], state)
        points.append(Point(int(nbytes[index]), float(loss[index]), order[:m], tuple(forms[c] for c in chosen)))
    return points


def in_order(cost: LayerCost, ranking: str) -> tuple[int, ...]:
    """Experts best first, in rounds of one per group where routing is group-limited; ties to the lower id."""
    score_E, groups = cost.scores[ranking], cost.site.num_groups
    size = cost.site.num_experts // groups
    ranked = [sorted(range(g * size, (g + 1) * size), key=lambda e: (-score_E[e], e)) for g in range(groups)]
    return tuple(expert for round_ in zip(*ranked, strict=True) for expert in round_)


def counts_allowed(cost: LayerCost) -> list[int]:
    """Numbers of experts a layer may keep: the router's top-k at least, whole rounds of its groups (two or more)."""
    site = cost.site
    groups = site.num_groups
    least = max(-(-site.top_k // groups), 2 if groups > 1 else 1)
    if site.groups:
        least = max(least, -(-site.top_k // site.groups[1]))
    return [rounds * groups for rounds in range(least, site.num_experts // groups + 1)]


def layer_plan(point: Point, cost: LayerCost, why: str) -> LayerPlan:
    """The point as a plan: kept experts in ascending order. Factors are computed, and kept as values."""
    chosen = dict(zip(point.kept, point.forms, strict=True))
    plan = LayerPlan.keep(point.kept, cost.site.num_experts, why=why)
    forms = [chosen[expert.parts[0][0]] for expert in plan.experts]
    ranks = [form if isinstance(form, Rank) else None for form in forms]
    if any(ranks):
        assert cost.bank is not None
        return plan.valued(values.keep(factored(cost.bank(sorted(chosen)), ranks)))
    precision = [form for form in forms if not isinstance(form, Rank)]
    return plan.with_bits([p[0] for p in precision], [p[1] for p in precision])


def uniform(cost: LayerCost, weights: Weights, ranking: str, count: int, form: Form = WHOLE) -> Point:
    """The point of a single method: the best ``count`` experts, all in one form."""
    order, name = in_order(cost, ranking), cost.site.name
    kept, gone = order[:count], list(order[count:])
    loss = weights.drop[name] * cost.drop[gone].sum() + weights.of(cost, form)[list(kept)].sum()
    nbytes = count * (cost.nbytes[form] + cost.row_nbytes)
    return Point(nbytes, float(loss), kept, (form,) * count)


def _bends(nbytes: np.ndarray, loss: np.ndarray) -> list[int]:
    """Indices of the Pareto front, thinned to ``MENU`` by leaving out, one by one, the point nearest to the line
    between its neighbours (losses on a logarithmic scale)."""
    order = np.lexsort((loss, nbytes))
    best = np.minimum.accumulate(loss[order])
    front = [int(i) for n, i in enumerate(order) if n == 0 or loss[i] < best[n - 1]]
    height = np.log(loss + 1e-4 * loss.max() + 1e-300)  # small losses differ by factors, and so they should count
    left, right = list(range(-1, len(front) - 1)), list(range(1, len(front) + 1))
    gone = [False] * len(front)

    def bend(i: int) -> float:
        a, b, c = front[left[i]], front[i], front[right[i]]
        wide, near = nbytes[c] - nbytes[a], nbytes[b] - nbytes[a]
        return float(abs(wide * (height[b] - height[a]) - near * (height[c] - height[a])))

    heap = [(bend(i), i) for i in range(1, len(front) - 1)]
    heapq.heapify(heap)
    remaining = len(front)
    while remaining > MENU and heap:
        area, i = heapq.heappop(heap)
        if gone[i]:
            continue
        now = bend(i)
        if now > area:  # a neighbour went since: weigh it again
            heapq.heappush(heap, (now, i))
            continue
        gone[i], remaining = True, remaining - 1
        right[left[i]], left[right[i]] = right[i], left[i]
    return [index for index, out in zip(front, gone, strict=True) if not out]
