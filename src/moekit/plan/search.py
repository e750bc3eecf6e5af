"""The search behind ``fit``: candidates from the solver and the single methods, then measurements to decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

from moekit.errors import BudgetError, PlanError
from moekit.plan.budget import Budget
from moekit.plan.calibrate import best_ranking, calibrated, rescaled, typical_weights
from moekit.plan.candidates import Candidate, distinct, named, rival, rows_kept, single_methods, solved
from moekit.plan.cost import WHOLE, LayerCost, stored_cost
from moekit.plan.document import Plan
from moekit.plan.planner import Evaluate
from moekit.plan.sizes import fixed_nbytes, plan_nbytes, source_nbytes
from moekit.plan.solve import Weights, smallest, solve
from moekit.plan.uniform import ONLY, Width, curve, uniform_plans, widths

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

LARGE = 1_000_000_000
"""Expert weights above which every measurement takes minutes."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: runs of layers probed (twice each), whether rankings are tried, how many single methods
    (those of least predicted loss), how often the solver runs again believing what was measured, how many plans at
    most (those of least predicted loss, and every rival; None: all), and whether plans that drop experts are tried
    with their router rows kept as well."""

    segments: int
    rankings: bool
    singles: int
    rounds: int
    finalists: int | None = None
    rows: bool = True


FULL, LIGHT = Effort(8, True, 10, 2), Effort(2, False, 3, 1)
STREAMED = Effort(2, False, 2, 0, finalists=4, rows=False)
"""Where each measurement is a pass over the weights on disk."""
FINISHED = 2
"""Plans whose rounding is done again with calibration: the best ones."""
TIE = 1e-5
"""Nats per token that measuring cannot tell from none. Plans so close to the source differ in a few near-ties of its
routers: all experts of the embedded model at 8 bits measure 1.3e-5 and 2.5e-5 on two texts of 8,000 tokens."""
Progress = Callable[[str, int, int], None]


def usual_effort(source: Checkpoint, evaluate: Evaluate | None) -> Effort:
    """What measuring costs decides how much of it is done."""
    if getattr(evaluate, "reads_disk", False):
        return STREAMED
    weights = sum(layer.num_experts * 3 * layer.hidden_size * layer.intermediate_size for layer in source.moe_layers)
    return LIGHT if weights > LARGE else FULL


class Search:
    """One search; holds what its steps share. ``room`` is the budget of experts and router rows, ``rest`` of all else,
    headers of the files included."""

    def __init__(
        self,
        source: Checkpoint,
        costs: Sequence[LayerCost],
        budget: Budget,
        evaluate: Evaluate | None,
        format: str,
        effort: Effort,
        tell: Progress,
    ) -> None:
        self.source, self.costs, self.budget = source, costs, budget
        self.evaluate, self.format, self.effort, self.tell = evaluate, format, effort, tell
        self.source_nbytes = source_nbytes(source)
        self.rest = fixed_nbytes(source)
        self.room = budget.nbytes - self.rest

    def run(
        self, rivals: Mapping[str, Plan], finish: Mapping[str, Callable[[Plan], Plan]] | None = None
    ) -> tuple[Candidate, list[Candidate], tuple[tuple[int, float], ...]]:
        quantised = bool(self.source.scheme.config)
        uniform = widths(self.source, self.costs, self.format) if self.format in ONLY else None
        if uniform is None and not quantised and self.room < smallest(self.costs):
            self._too_small()
        rankings, weights = self._calibrated()
        found = list(self._solved(weights, rankings[:2])) if uniform is None else []
        solvable = bool(found)
        if solvable:  # headers, and all else, were only estimated so far
            self.rest = self.budget.nbytes + self._over(found[0].plan) - found[0].nbytes
        found += self._singles(weights, rankings, uniform)
        found += self._as_stored(weights, rankings) if quantised and uniform is None else []
        found += [rival(name, plan) for name, plan in rivals.items() if self._fits(plan)]
        ranked = self._measured(distinct(found))
        if not ranked:
            self._too_small(uniform)
        if self.evaluate is not None and uniform is None:
            ranked = self._refined(ranked, weights, rankings, self.effort.rounds if solvable else 0)
        if self.evaluate is not None and finish:
            ranked = self._finished(ranked, finish)
        if uniform is not None:
            return ranked[0], ranked, curve(self.costs, weights, rankings[0], uniform)
        whole = solve(self.costs, weights, rankings[0], self.room) if solvable else None
        return ranked[0], ranked, tuple((n + self.rest, loss) for n, loss in whole.curve) if whole else ()

    def _calibrated(self) -> tuple[list[str], Weights]:
        """The rankings, best first, and what a unit of disturbance costs; measured where the model can run."""
        key, evaluate = self.source.fingerprint, self.evaluate
        if evaluate is None:
            return best_ranking(self.costs, key, None), typical_weights(self.costs)
        tried = self._counted("trying rankings", len(self.costs[0].scores)) if self.effort.rankings else None
        rankings = best_ranking(self.costs, key, tried)
        runs = min(self.effort.segments, len(self.costs))
        probe = self._counted("probing layers", 2 * runs)
        return rankings, calibrated(self.costs, key, rankings[0], probe, self.effort.segments)

    def _counted(self, what: str, total: int) -> Evaluate:
        """The same measurement, told as it goes."""
        done = iter(range(1, total + 1))
        self.tell(what, 0, total)

        def evaluate(plan: Plan) -> float:
            assert self.evaluate is not None
            loss = self.evaluate(plan)
            self.tell(what, next(done, total), total)
            return loss

        return evaluate

    def _singles(self, weights: Weights, rankings: Sequence[str], uniform: Sequence[Width] | None) -> list[Candidate]:
        """The single methods of least predicted loss; every plan of one count and one precision is one of them."""
        key = self.source.fingerprint
        if uniform is None:
            found = single_methods(self.costs, weights, rankings[:3], self.room, key)
        else:
            found = uniform_plans(self.costs, weights, rankings[:3], uniform, self.budget.nbytes, key)
        return sorted((one for one in found if self._fits(one.plan)), key=lambda one: one.predicted)[
            : self.effort.singles
        ]

    def _refined(
        self, ranked: list[Candidate], weights: Weights, rankings: Sequence[str], rounds: int
    ) -> list[Candidate]:
        """The solver again, believing what was measured; then the best plan that drops experts with their rows kept."""
        for _ in range(rounds):
            believed = rescaled(weights, ranked)
            again = self._solved(weights, rankings[:1], believed)
            ranked = self._measured(distinct([*ranked, *islice(again, 2)]))
        if not self.effort.rows:
            return ranked
        drops = (one for one in ranked if one.drop > 0 and any(layer.dropped for layer in one.plan.layers.values()))
        dropping = next(drops, ranked[0])
        return self._measured([*ranked, *rows_kept(dropping, self.costs, self.source.bank)])

    def _finished(self, ranked: list[Candidate], finish: Mapping[str, Callable[[Plan], Plan]]) -> list[Candidate]:
        """The best plans that round, rounded in other ways too; among plans that measure alike these come first.

        The first way is tried on several plans, the others on the one that came out best.
        """
        bases = [one for one in ranked if any(e.bits != 16 for p in one.plan.layers.values() for e in p.experts)]
        bases = bases[:FINISHED]
        for how, way in finish.items():
            made = {
                f"{one.name}, {how}": replace(one, plan=way(one.plan), measured=None, calibrated=True) for one in bases
            }
            ranked = self._measured([*ranked, *(replace(one, name=name) for name, one in made.items())])
            names = [one.name for one in ranked if one.name in made]
            bases = [one for one in bases if names and f"{one.name}, {how}" == names[0]]
        least = ranked[0].loss + TIE
        return sorted(ranked, key=lambda one: not (one.calibrated and one.measured is not None and one.loss <= least))

    def _as_stored(self, weights: Weights, rankings: Sequence[str]) -> list[Candidate]:
        """A source stored quantised keeps that layout, and its sizes, as long as experts are only dropped."""
        layers = {layer.name: layer for layer in self.source.moe_layers}
        costs = [stored_cost(self.source, layers[cost.site.name], cost) for cost in self.costs]
        whole = sum(c.site.num_experts * (c.nbytes[WHOLE] + c.row_nbytes) for c in costs)
        room = self.budget.nbytes - self.source_nbytes + whole
        return list(single_methods(costs, weights, rankings[:3], room, self.source.fingerprint))

    def _measured(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Best first, those measured before those only predicted; by prediction where nothing can be measured."""
        known = [one for one in candidates if one.measured is not None]
        new = [one for one in candidates if one.measured is None and self._fits(one.plan)]
        if self.evaluate is None:
            return sorted(new, key=lambda one: one.loss)
        # Of a rival nothing is predicted, so that only measuring tells.
        new.sort(key=lambda one: (not math.isnan(one.predicted), one.predicted))
        rivals = sum(math.isnan(one.predicted) for one in new)
        most = None if self.effort.finalists is None else max(self.effort.finalists - len(known), 0) + rivals
        measure = self._counted("measuring plans", len(new[:most]))
        known += [replace(one, measured=measure(one.plan)) for one in new[:most]]
        return sorted(known, key=lambda one: one.loss) + (new[most:] if most is not None else [])

    def _fits(self, plan: Plan) -> bool:
        """Whether the output is small enough; False too where the format cannot express the plan."""
        try:
            return self._over(plan) <= 0
        except PlanError:
            return False

    def _solved(
        self, weights: Weights, rankings: Sequence[str], believed: Weights | None = None
    ) -> Iterator[Candidate]:
        key = self.source.fingerprint
        return solved(self.costs, weights, rankings, self.room, key, believed, self._over)

    def _over(self, plan: Plan) -> int:
        """By how many bytes the output is too large."""
        return plan_nbytes(plan, self.source, self.format) - self.budget.nbytes

    def _too_small(self, uniform: Sequence[Width] | None = None) -> NoReturn:
        least, nbytes = self.rest + smallest(self.costs), self.costs[0].nbytes
        how = named(min(nbytes, key=lambda form: nbytes[form]))
        if uniform is not None:
            least, precision = min((width.nbytes(width.counts[0]), width.precision) for width in uniform)
            how = named(precision)
        raise BudgetError(
            f"no plan fits {self.budget.asked} ({self.budget.nbytes:,} bytes of weights): the smallest possible is "
            f"about {least:,} bytes, with the fewest experts the router allows at {how}"
        )
