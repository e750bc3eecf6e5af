"""Fit a model into a budget, losing least: costs, a solver and, where the model can run, measurements to decide.

The loss is the KL divergence from the source in nats per token. It is predicted from the profile and the weights and
calibrated by a few probes; the plans worth comparing (the solver's, and every single method's at no more bytes) are
then measured on calibration tokens, and the least measured loss wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moekit.plan.budget import Budget, Size, budget_of
from moekit.plan.candidates import Candidate
from moekit.plan.check import check_routers
from moekit.plan.cost import PRECISIONS, Precision, layer_cost
from moekit.plan.document import Plan
from moekit.plan.explain import explain, levers
from moekit.plan.low_rank import ranks_of
from moekit.plan.planner import Evaluate
from moekit.plan.search import Effort, Progress, Search, usual_effort
from moekit.plan.sizes import plan_nbytes
from moekit.plan.uniform import ONLY

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile


@dataclass(frozen=True)
class FitResult:
    """``predicted`` and ``measured`` in nats per token (``measured`` None where nothing ran); ``nbytes`` of the
    output's weight files, exactly; ``curve`` (bytes, predicted loss) over all budgets; ``candidates`` best first, those
    measured before those only predicted; ``reads_disk`` if each measurement was a pass over the weights on disk;
    ``low_rank`` if factors were weighed."""

    plan: Plan
    nbytes: int
    source_nbytes: int
    budget: Budget
    predicted: float
    measured: float | None
    curve: tuple[tuple[int, float], ...]
    candidates: tuple[Candidate, ...]
    reads_disk: bool = False
    low_rank: bool = False

    @property
    def spread(self) -> tuple[float, float] | None:
        """How many times its prediction the loss of the other measured plans was, at least and at most: how far the
        prediction can be trusted. None where fewer than two tell."""
        others = [one for one in self.candidates[1:] if one.measured and one.predicted > 0]
        ratios = [(one.measured or 0.0) / one.predicted for one in others]
        return (min(ratios), max(ratios)) if len(ratios) > 1 else None

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
    low_rank: bool = True,
    weights: bool = True,
    rivals: Mapping[str, Plan] | None = None,
    finish: Mapping[str, Callable[[Plan], Plan]] | None = None,
    format: str = "auto",
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Choose what to keep of every layer, and at how many bits or which rank, to lose least within a budget.

    Args:
        size, memory, context, ratio: the budget; see :func:`~moekit.plan.budget.budget_of`.
        evaluate: loss of a plan on calibration tokens (such as :class:`~moekit.plan.live.LiveLoss`); without one the
            prediction alone decides, with typical weights instead of calibrated ones.
        precisions: (bits, group size) pairs an expert may have.
        low_rank: whether experts may be stored as factors too, where the format can hold them.
        weights: False reads headers only, and takes the rounding error of normally distributed weights, and no factors.
        rivals: plans of other methods to compare with, by name; those over the budget are left out.
        finish: other ways to round what the best plans round, as large to the byte (with calibration, say), by what
            they are called; tried where plans can be measured.
        format: the output format; one that cannot say everything ("stock", "compressed-tensors") leaves one number of
            experts for all layers, at one precision.
        effort: how much to measure; None for ``FULL``, or ``LIGHT`` above ``LARGE`` expert weights, or ``STREAMED``.
        progress: told (what, done, total); of each part when it begins, and after each step of it.

    Raises:
        BudgetError: no plan is small enough; names the smallest possible. ProfileError: the profile is of another model
        or lacks a statistic. OptionError: not exactly one budget, or one out of range. UnsupportedModelError: several
        routers choose from the experts of one layer.
    """
    check_routers(source.moe_layers)
    budget = budget_of(source, size=size, memory=memory, context=context, ratio=ratio)
    profile.check_source(source.fingerprint)
    profile.require(["counts", "output_energy"])
    tell = progress or (lambda what, done, total: None)
    layers = [layer for layer in source.moe_layers if not layer.extra]
    costs = []
    precisions = (*precisions, *(p for p in ONLY.get(format, ()) if p not in precisions))
    tell("weighing layers", 0, len(layers))
    for index, layer in enumerate(layers):
        ranks = ranks_of(layer) if low_rank and format not in ONLY else ()
        seen = profile.layers[layer.name]
        costs.append(layer_cost(source, layer, seen, precisions, ranks=ranks, weights=weights))
        tell("weighing layers", index + 1, len(layers))
    search = Search(source, costs, budget, evaluate, format, effort or usual_effort(source, evaluate), tell)
    best, ranked, curve = search.run(rivals or {}, finish)
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
        reads_disk=getattr(evaluate, "reads_disk", False),
        low_rank=any(cost.ranks for cost in costs),
    )
