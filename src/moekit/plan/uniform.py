"""The solver for formats that say little: one number of experts for all layers, all of them at one precision.

Few enough plans that each is looked at: every number of experts, at every precision of the format, by each ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.checkpoint.export import BITS
from moekit.errors import PlanError
from moekit.plan.candidates import Candidate, candidate
from moekit.plan.cost import WHOLE, LayerCost, Precision
from moekit.plan.sizes import plan_nbytes
from moekit.plan.solve import Weights, counts_allowed, uniform

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

EXPORTED: tuple[Precision, ...] = tuple((bits, group) for bits in BITS for group in (128, 64, 32))
ONLY: dict[str, tuple[Precision, ...]] = {"stock": (WHOLE,), "compressed-tensors": EXPORTED}
"""By format: the precisions of which it takes one for all experts. The other formats take any plan."""


@dataclass(frozen=True)
class Width:
    """One precision: ``nbytes(count)`` of the weight files when every layer keeps ``count`` experts at it."""

    precision: Precision
    counts: tuple[int, ...]
    nbytes: Callable[[int], int]


def widths(source: Checkpoint, costs: Sequence[LayerCost], format: str) -> list[Width]:
    """The precisions that the format has and this model's shapes allow. PlanError where that is none."""
    counts = tuple(c for c in counts_allowed(costs[0]) if all(c in counts_allowed(cost) for cost in costs))
    found: list[Width] = []
    why: PlanError | None = None
    for precision in ONLY[format]:
        try:
            ends = [_exact(source, costs, format, precision, count) for count in (counts[0], counts[-1])]
        except PlanError as error:
            why = error
            continue
        found.append(Width(precision, counts, _line((counts[0], ends[0]), (counts[-1], ends[1]))))
    if why is not None and not found:
        raise why
    return found


def uniform_plans(
    costs: Sequence[LayerCost],
    weights: Weights,
    rankings: Sequence[str],
    among: Sequence[Width],
    budget: int,
    source: str,
) -> Iterator[Candidate]:
    """For each precision and ranking, the most experts per layer whose files take no more than ``budget`` bytes, and
    one fewer (sizes in between are exact but for the headers)."""
    for width in among:
        fit = [count for count in width.counts if width.nbytes(count) <= budget][-2:]
        for count in reversed(fit):
            whole = count == costs[0].site.num_experts
            for ranking in rankings[:1] if whole else rankings:
                yield _plan(costs, weights, ranking, width.precision, count, source)


def curve(
    costs: Sequence[LayerCost], weights: Weights, ranking: str, among: Sequence[Width]
) -> tuple[tuple[int, float], ...]:
    """(bytes of the weight files, predicted loss) of the plans that no smaller one beats, smallest first."""
    points = [
        (width.nbytes(count), sum(uniform(cost, weights, ranking, count, width.precision).loss for cost in costs))
        for width in among
        for count in width.counts
    ]
    best, kept = math.inf, []
    for nbytes, loss in sorted(points):
        if loss < best:
            best = loss
            kept.append((nbytes, loss))
    return tuple(kept)


def _plan(
    costs: Sequence[LayerCost], weights: Weights, ranking: str, precision: Precision, count: int, source: str
) -> Candidate:
    points = [uniform(cost, weights, ranking, count, precision) for cost in costs]
    total = costs[0].site.num_experts
    name = "all experts" if count == total else f"{count} of {total} experts by {ranking}"
    bits = "" if precision == WHOLE else f" at {precision[0]} bits in groups of {precision[1]}"
    return candidate(name + bits, points, costs, weights, source)


def _exact(source: Checkpoint, costs: Sequence[LayerCost], format: str, precision: Precision, count: int) -> int:
    unit = Weights(*[dict.fromkeys((cost.site.name for cost in costs), 1.0)] * 2)
    ranking = next(iter(costs[0].scores))
    return plan_nbytes(_plan(costs, unit, ranking, precision, count, source.fingerprint).plan, source, format)


def _line(first: tuple[int, int], last: tuple[int, int]) -> Callable[[int], int]:
    """Every expert takes as much as the next: bytes on the line through two counts."""
    slope = (last[1] - first[1]) / max(last[0] - first[0], 1)
    return lambda count: round(first[1] + slope * (count - first[0]))
