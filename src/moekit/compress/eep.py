"""EEP: search by evolution which experts to keep, then which mixtures of all experts they become.

Paper: Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models: Enhancing Performance and Reducing
    Inference Costs, 2024 (n 44, arXiv 2407.00945).
Method: a candidate has, per group of layers, W [M, E] with new expert j = sum_i W[j, i] expert i, and M router rows.
    Phase 1 (prune): W one-hot at the rows. 30 random subsets, then children of candidates within 3 points of the best:
    each group changes with probability 0.25 (one at least), each of its rows moves to an unused expert with 0.15.
    Phase 2 (merge): with 0.3 a crossover of two candidates within 1 point of the best or among the best 6 (each row
    from the first with 0.6), else a candidate within 3 points; then every element of W in the changed groups gains
    0.065 N(0, 1) with 0.25, and with 0.1 all rows are divided by their sums. Nothing measured is ever dropped.
Uses: compress._search, compress._select
Differs: router rows stay one-hot in phase 2 (a dense map of the full softmax has no stock router), chosen by phase 1
    and crossover. Rows whose sum is near zero or negative are not divided. Points are 100 exp(-loss), or with
    ``fitness=error`` 100 (1 - loss). The best of the search is taken without a second set to re-rank the best 20.
Claim: Mixtral-8x7B-Instruct with half of its experts gains on some tasks (SQuAD 53.4 to 75.4) without training.
Shown: lab.experiments.eep
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from moekit.algebra import share_to_count
from moekit.compress._search import Search, in_turn
from moekit.compress._select import check_keep, keep_best
from moekit.errors import OptionError
from moekit.plan.document import LayerPlan, Plan, StoredExpert
from moekit.plan.planner import Evaluate, Method, PlannedSource, Site, Source, sites_of

if TYPE_CHECKING:
    from moekit.profile import Profile

CHANGE, MOVE = 0.25, 0.15
CROSS, FIRST, CLOSE, ELITE = 0.3, 0.6, 1.0, 6
WITHIN, NUDGE, SCALE, DIVIDE = 3.0, 0.25, 0.065, 0.1
DIGITS = 6
"""Decimals of W, so that a plan can be read."""
LEAST_SUM = 0.1
"""A row of W whose sum is below is not divided by it: it would explode, or turn its sign."""


class Group(NamedTuple):
    """One group of layers: router rows [M], ascending, and ``weights`` [M, E] (None: each row its own expert)."""

    rows: tuple[int, ...]
    weights: np.ndarray | None = None


Genome = tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class Eep(Method):
    """``keep`` is a share or a number of experts per layer. ``evaluations`` plans are measured, ``discrete`` of them (a
    share or a number) in phase 1, which begins with ``initial`` random ones (of ``discrete``); all three alike is the
    best of so many random draws. ``groups`` of consecutive layers share one W (0: every layer has its own)."""

    keep: float | int = 0.5
    evaluations: int = 400
    discrete: float | int = 0.25
    initial: float | int = 0.3
    groups: int = 0
    fitness: Literal["divergence", "error"] = "divergence"
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        first, second = self.counts
        if not 1 <= first <= second <= self.evaluations:
            raise OptionError(
                f"eep: evaluations={self.evaluations} with discrete={second} of them and initial={first} of these: "
                "give 1 <= initial <= discrete <= evaluations"
            )
        if self.groups < 0:
            raise OptionError(f"eep: groups={self.groups} of layers; give 1 or more, or 0 for one per layer")

    @property
    def counts(self) -> tuple[int, int]:
        """Measurements of random subsets, and of phase 1 with these."""
        discrete = share_to_count(self.discrete, self.evaluations)
        return share_to_count(self.initial, discrete), discrete

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        if evaluate is None:
            raise OptionError("eep searches by measuring plans and has nothing to measure on: give text, or a profile")
        spans = self._spans([site for site in sites_of(source) if not site.extra])
        with in_turn():
            search = self._search(spans, profile, source, evaluate)
        pruned, best = min(one.loss for one in search.archive[: self.counts[1]]), search.ranked()[0]
        why = f"the best of {self.evaluations} plans measured at {best.loss:.6g} (pruning alone {pruned:.6g})"
        return self.made(expressed(best.genome, spans, why), profile, source)

    def draft(self, profile: Profile | None, source: Source) -> Plan:
        """The first random draw: as large as whatever the search finds."""
        spans = self._spans([site for site in sites_of(source) if not site.extra])
        return self.made(expressed(self._draw(spans).subsets(), spans), profile, source)

    def _draw(self, spans: Sequence[Sequence[Site]]) -> Draw:
        return Draw(np.random.default_rng([44, abs(self.seed)]), [span[0] for span in spans], self.keep)

    def _search(
        self, spans: Sequence[Sequence[Site]], profile: Profile | None, source: Source, evaluate: Evaluate
    ) -> Search[Genome]:
        done = source.done.fingerprint if isinstance(source, PlannedSource) else "nothing"
        search: Search[Genome] = Search(
            lambda genome: self.made(expressed(genome, spans), profile, source),
            evaluate,
            about=f"{self.spec} of {source.fingerprint} after {done}",
            total=self.evaluations,
            points=self.points,
        )
        draw = self._draw(spans)
        first, discrete = self.counts
        for number in range(self.evaluations):
            make = draw.subsets if number < first else draw.moved if number < discrete else draw.mixed
            search.try_new(partial(make, search))
        return search

    def points(self, loss: float) -> float:
        """The fitness of a loss, 100 for none."""
        return 100 * (math.exp(-loss) if self.fitness == "divergence" else 1 - loss)

    def _spans(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Runs of layers that share one W. OptionError where layers of a run differ."""
        count = min(self.groups or len(sites), len(sites))
        spans = [[sites[i] for i in part] for part in np.array_split(np.arange(len(sites)), count)]
        for span in spans:
            for site in span:
                if (site.num_experts, site.top_k, site.groups) != (span[0].num_experts, span[0].top_k, span[0].groups):
                    raise OptionError(
                        f"eep: groups={self.groups} puts {span[0].name} ({span[0].num_experts} experts) and "
                        f"{site.name} ({site.num_experts}) together, which differ: use groups=0"
                    )
        return spans


class Draw:
    """New candidates, from the random numbers of one seed."""

    def __init__(self, rng: np.random.Generator, sites: Sequence[Site], keep: float | int) -> None:
        self.rng, self.sites, self.keep = rng, sites, keep

    def subsets(self, search: Search[Genome] | None = None) -> Genome:
        draws = [keep_best(self.rng.random(site.num_experts), self.keep, site, why="a draw") for site in self.sites]
        return tuple(Group(tuple(sorted(plan.sources))) for plan in draws)

    def moved(self, search: Search[Genome]) -> Genome:
        """Phase 1: a parent with some rows at unused experts."""
        parent = self._parent(search)
        pairs = zip(parent, self.sites, self._changed(), strict=True)
        return tuple(self._move(group, site) if change else group for group, site, change in pairs)

    def mixed(self, search: Search[Genome]) -> Genome:
        """Phase 2: a parent or a cross of two, with some weights nudged."""
        changed = self._changed()
        cross = self.rng.random() < CROSS
        parent = self._cross(search, changed) if cross else self._parent(search)
        made = [self._nudge(g, s) if c else g for g, s, c in zip(parent, self.sites, changed, strict=True)]
        return tuple(map(divided, made)) if self.rng.random() < DIVIDE else tuple(made)

    def _parent(self, search: Search[Genome]) -> Genome:
        close = search.parents(WITHIN)
        return close[self.rng.integers(len(close))].genome

    def _changed(self) -> np.ndarray:
        """Which groups change: each with its probability, at least one."""
        while True:
            changed = self.rng.random(len(self.sites)) < CHANGE
            if changed.any():
                return changed

    def _move(self, group: Group, site: Site) -> Group:
        size, rows = site.num_experts // site.num_groups, list(group.rows)
        for index, row in enumerate(rows):
            first = row // size * size  # a row stays in its routing group
            free = [e for e in range(first, first + size) if e not in rows]
            if free and self.rng.random() < MOVE:
                rows[index] = free[self.rng.integers(len(free))]
        return Group(tuple(sorted(rows)))

    def _cross(self, search: Search[Genome], changed: np.ndarray) -> Genome:
        close = search.parents(CLOSE, ELITE)
        if len(close) < 2:
            return close[0].genome
        one, two = (close[i].genome for i in self.rng.choice(len(close), 2, replace=False))
        return tuple(map(self._cross_group, one, two, self.sites, changed))

    def _cross_group(self, one: Group, two: Group, site: Site, change: bool) -> Group:
        """Row by row from either parent, or as a whole where the group does not change; no router row twice."""
        if not change:
            return one if self.rng.random() < FIRST else two
        from_first = self.rng.random(len(one.rows)) < FIRST
        while True:
            rows = np.where(from_first, one.rows, two.rows)
            twice = [i for i in np.flatnonzero(~from_first) if (rows == rows[i]).sum() > 1]
            if not twice:
                break
            from_first[twice[0]] = True
        weights_ME = np.where(from_first[:, None], matrix(one, site), matrix(two, site))
        order = np.argsort(rows)
        return Group(tuple(rows[order].tolist()), weights_ME[order])

    def _nudge(self, group: Group, site: Site) -> Group:
        weights_ME = matrix(group, site)
        chosen = self.rng.random(weights_ME.shape) < NUDGE
        step_ME = SCALE * self.rng.normal(size=weights_ME.shape)
        return Group(group.rows, np.round(weights_ME + np.where(chosen, step_ME, 0.0), DIGITS))


def matrix(group: Group, site: Site) -> np.ndarray:
    """[M, E]: the group's W."""
    return np.eye(site.num_experts)[list(group.rows)] if group.weights is None else group.weights


def divided(group: Group) -> Group:
    """Rows of W divided by their sums, where these are not near zero or negative."""
    if group.weights is None:
        return group
    total_M1 = group.weights.sum(axis=1, keepdims=True)
    safe_M1 = np.where(total_M1 >= LEAST_SUM, total_M1, 1.0)
    return Group(group.rows, np.round(group.weights / safe_M1, DIGITS))


def expressed(genome: Genome, spans: Sequence[Sequence[Site]], why: str = "a candidate") -> dict[str, LayerPlan]:
    """The plan of every layer: router rows as the source has them, experts mixed by W."""
    return {site.name: _layer(group, site, why) for group, span in zip(genome, spans, strict=True) for site in span}


def _layer(group: Group, site: Site, why: str) -> LayerPlan:
    kept = LayerPlan.keep(group.rows, site.num_experts, why=why)
    if group.weights is None:
        return kept
    # A row that lost all its weights is an expert of zeros, which still has to name what it is made of.
    parts = ([(int(e), float(row_E[e])) for e in np.flatnonzero(row_E)] for row_E in group.weights)
    mixed = (StoredExpert(tuple(found or [(row, 0.0)])) for found, row in zip(parts, group.rows, strict=True))
    return replace(kept, experts=tuple(mixed))
