"""Fit a model into a budget, losing least: costs, a solver and, where the model can run, measurements to decide.

The loss is the KL divergence from the source in nats per token. It is predicted from the profile and the weights and
calibrated by a few probes; the plans worth comparing (the solver's, and every single method's at no more bytes) are
then measured on calibration tokens, and the least measured loss wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

from moekit.errors import BudgetError, PlanError
from moekit.plan.budget import Budget, Size, budget_of
from moekit.plan.calibrate import best_ranking, calibrated, rescaled, typical_weights
from moekit.plan.candidates import Candidate, distinct, rival, rows_kept, single_methods, solved
from moekit.plan.cost import PRECISIONS, WHOLE, LayerCost, Precision, layer_cost, stored_cost
from moekit.plan.document import Plan
from moekit.plan.explain import explain, levers
from moekit.plan.planner import Evaluate
from moekit.plan.sizes import fixed_nbytes, plan_nbytes, source_nbytes
from moekit.plan.solve import Weights, smallest, solve

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile

ANYTHING = ("auto", "moekit")
"""Formats that can express every plan; the others are left with single methods."""
LARGE = 1_000_000_000
"""Expert weights above which every measurement takes minutes."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: runs of layers probed (twice each), whether rankings are tried, how many single methods
    (those of least predicted loss), and how often the solver runs again believing what was measured."""

    segments: int
    rankings: bool
    singles: int
    rounds: int


FULL, LIGHT = Effort(8, True, 10, 2), Effort(2, False, 3, 1)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FitResult:
    """``predicted`` and ``measured`` in nats per token (``measured`` None where nothing ran); ``nbytes`` of the
    output's weight files, exactly; ``curve`` (bytes, predicted loss) over all budgets; ``candidates`` best first."""

    plan: Plan
    nbytes: int
    source_nbytes: int
    budget: Budget
    predicted: float
    measured: float | None
    curve: tuple[tuple[int, float], ...]
    candidates: tuple[Candidate, ...]

    @property
    def levers(self) -> tuple[str, ...]:
        """One line per lever: how far it was used, and why."""
        return levers(self)

    def describe(self) -> str:
        """What it would do and why, to read before doing it."""
        return explain(self)


def fit(
    source: Checkpoint,
    profile: Profile,
    *,
    size: Size | None = None,
    memory: Size | None = None,
    context: int | None = None,
    ratio: float | None = None,
    evaluate: Evaluate | None = None,
    precisions: Sequence[Precision] = PRECISIONS,
    weights: bool = True,
    rivals: Mapping[str, Plan] | None = None,
    format: str = "auto",
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Choose what to keep of every layer, and at how many bits, to lose least within a budget.

    Args:
        size, memory, context, ratio: the budget; see :func:`~moekit.plan.budget.budget_of`.
        evaluate: loss of a plan on calibration tokens (such as :class:`~moekit.plan.live.LiveLoss`); without one the
            prediction alone decides, with typical weights instead of calibrated ones.
        precisions: (bits, group size) pairs an expert may have.
        weights: False reads headers only, and takes the rounding error of normally distributed weights.
        rivals: plans of other methods to compare with, by name; those over the budget are left out.
        format: the output format; one that cannot say everything ("stock", "compressed-tensors") leaves only the plans
            that it can.
        effort: how much to measure; None for ``FULL``, or ``LIGHT`` above ``LARGE`` expert weights.
        progress: told (what, done, total).

    Raises:
        BudgetError: no plan is small enough; names the smallest possible. ProfileError: the profile is of another model
        or lacks a statistic. OptionError: not exactly one budget, or one out of range.
    """
    budget = budget_of(source, size=size, memory=memory, context=context, ratio=ratio)
    profile.check_source(source.fingerprint)
    profile.require(["counts", "output_energy"])
    tell = progress or (lambda what, done, total: None)
    layers = [layer for layer in source.moe_layers if not layer.extra]
    costs = []
    for index, layer in enumerate(layers):
        costs.append(layer_cost(source, layer, profile.layers[layer.name], precisions, weights=weights))
        tell("weighing layers", index + 1, len(layers))
    search = _Search(source, costs, budget, evaluate, format, effort or _effort(source), tell)
    best, ranked, curve = search.run(rivals or {})
    plan = replace(best.plan, profile=profile.fingerprint)
    return FitResult(
        plan=plan,
        nbytes=plan_nbytes(plan, source, format),
        source_nbytes=search.source_nbytes,
        budget=budget,
        predicted=best.predicted,
        measured=best.measured,
        curve=curve,
        candidates=tuple(ranked),
    )


def _effort(source: Checkpoint) -> Effort:
    weights = sum(layer.num_experts * 3 * layer.hidden_size * layer.intermediate_size for layer in source.moe_layers)
    return LIGHT if weights > LARGE else FULL


class _Search:
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

    def run(self, rivals: Mapping[str, Plan]) -> tuple[Candidate, list[Candidate], tuple[tuple[int, float], ...]]:
        key, quantised = self.source.fingerprint, bool(self.source.scheme.config)
        if self.room < smallest(self.costs) and not quantised:
            self._too_small()
        rankings = best_ranking(self.costs, key, self.evaluate if self.effort.rankings else None)
        weights = typical_weights(self.costs)
        if self.evaluate is not None:
            weights = calibrated(self.costs, key, rankings[0], self.evaluate, self.effort.segments)
        solvable = self.format in ANYTHING and self._leave_room_for_headers(weights, rankings[0])
        singles = (
            one for one in single_methods(self.costs, weights, rankings[:3], self.room, key) if self._fits(one.plan)
        )
        found = list(solved(self.costs, weights, rankings[:2], self.room, key)) if solvable else []
        found += sorted(singles, key=lambda one: one.predicted)[: self.effort.singles]
        found += self._as_stored(weights, rankings) if quantised else []
        found += [rival(name, plan) for name, plan in rivals.items() if self._fits(plan)]
        ranked = self._measured(distinct(found))
        if not ranked:
            self._too_small()
        if self.evaluate is not None:
            ranked = self._refined(ranked, weights, rankings, self.effort.rounds if solvable else 0)
        whole = solve(self.costs, weights, rankings[0], self.room) if solvable else None
        return ranked[0], ranked, tuple((n + self.rest, loss) for n, loss in whole.curve) if whole else ()

    def _refined(
        self, ranked: list[Candidate], weights: Weights, rankings: Sequence[str], rounds: int
    ) -> list[Candidate]:
        """The solver again, believing what was measured; then the best plan that drops experts with their rows kept."""
        for _ in range(rounds):
            believed = rescaled(weights, ranked)
            again = solved(self.costs, weights, rankings[:1], self.room, self.source.fingerprint, believed)
            ranked = self._measured(distinct([*ranked, *islice(again, 1)]))
        dropping = next((one for one in ranked if one.drop > 0), ranked[0])
        return self._measured([*ranked, *rows_kept(dropping, self.costs, self.source.bank)])

    def _as_stored(self, weights: Weights, rankings: Sequence[str]) -> list[Candidate]:
        """A source stored quantised keeps that layout, and its sizes, as long as experts are only dropped."""
        layers = {layer.name: layer for layer in self.source.moe_layers}
        costs = [stored_cost(self.source, layers[cost.site.name], cost) for cost in self.costs]
        whole = sum(c.site.num_experts * (c.nbytes[WHOLE] + c.row_nbytes) for c in costs)
        room = self.budget.nbytes - self.source_nbytes + whole
        return list(single_methods(costs, weights, rankings[:3], room, self.source.fingerprint))

    def _measured(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Best first; by prediction where nothing can be measured."""
        judged = []
        for index, one in enumerate(candidates):
            if one.measured is None and not self._fits(one.plan):
                continue
            if one.measured is None and self.evaluate is not None:
                one = replace(one, measured=self.evaluate(one.plan))
            judged.append(one)
            self.tell("measuring plans", index + 1, len(candidates))
        return sorted(judged, key=lambda one: one.loss)

    def _fits(self, plan: Plan) -> bool:
        """Whether the output is small enough; False too where the format cannot express the plan."""
        try:
            return plan_nbytes(plan, self.source, self.format) <= self.budget.nbytes
        except PlanError:
            return False

    def _leave_room_for_headers(self, weights: Weights, ranking: str) -> bool:
        """Headers are only estimated so far: a first solution tells what they, and all else, really take. False where
        nothing fits once that is known."""
        for _ in range(8):
            found = next(solved(self.costs, weights, [ranking], self.room, self.source.fingerprint), None)
            if found is None:
                return False
            exact = plan_nbytes(found.plan, self.source, self.format)
            self.rest = exact - found.nbytes
            if exact <= self.budget.nbytes:
                return True
            self.room -= exact - self.budget.nbytes
        return False

    def _too_small(self) -> NoReturn:
        least = self.rest + smallest(self.costs)
        bits = min(precision[0] for precision in self.costs[0].nbytes)
        raise BudgetError(
            f"no plan fits {self.budget.asked} ({self.budget.nbytes:,} bytes of weights): the smallest possible is "
            f"about {least:,} bytes, with the fewest experts the router allows at {bits} bits"
        )
