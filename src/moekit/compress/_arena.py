"""Where methods meet: one model in memory, profiles by seed, and what a plan costs on text that nothing had seen.

Every answer is remembered, so that contestants share their baselines' runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moekit.compress._finish import finishes
from moekit.compress._within import chain, within
from moekit.plan import LiveLoss, Plan, fit, make_plan
from moekit.plan.sizes import plan_nbytes, source_nbytes

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile
    from moekit.stream import Runner

FIT = "fit"
"""The contestant that is not a method but the solver over all of them."""
SEARCHED = 1024
"""Tokens that a searching method measures each of its hundreds of plans on, taken evenly from those that choose."""


class Texts(Protocol):
    """What an arena is fed: for each seed a profile, sequences that choose, and others by domain that judge."""

    def profile(self, seed: int) -> Profile: ...

    def choosing(self, seed: int) -> Sequence[np.ndarray]: ...

    def judging(self, seed: int) -> Mapping[str, Sequence[np.ndarray]]: ...


class Arena:
    """``runner`` runs ``source``; its model is changed while a plan is measured, and as it was afterwards."""

    def __init__(self, source: Checkpoint, runner: Runner, texts: Texts) -> None:
        self.source, self.runner = source, runner
        self.seen = cache(texts.profile)
        self._choosing, self._judging = texts.choosing, texts.judging
        self._choices: dict[tuple[str, int], float] = {}
        self._plans: dict[tuple[str, int], Plan] = {}
        self._losses: dict[tuple[str, int], dict[str, float]] = {}
        self._judges = cache(self._make_judges)
        self._chooser = cache(self._make_chooser)
        self._searcher = cache(self._make_searcher)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the weight files that hold the source unchanged."""
        return source_nbytes(self.source)

    def nbytes(self, plan: Plan) -> int:
        """Bytes of the weight files the plan makes."""
        return plan_nbytes(plan, self.source)

    def plan(self, spec: str, seed: int) -> Plan:
        """The plan of ``A/B/...`` with these options, from the seed's profile."""
        if (spec, seed) not in self._plans:
            self._plans[spec, seed] = make_plan(
                chain(spec), self.source, self.seen(seed), lambda plan: self.chosen_by(plan, seed)
            )
        return self._plans[spec, seed]

    def within(self, spec: str, seed: int, nbytes: int) -> tuple[str, Plan] | None:
        """The largest setting of ``A/B/...`` that takes at most so many bytes; see :func:`moekit.compress.within`.

        ``fit`` is the solver's plan for that size.
        """
        if spec == FIT:
            seen = self.seen(seed)
            finish = finishes(self.source, seen)
            found = fit(self.source, seen, size=nbytes, evaluate=partial(self._choice, seed=seed), finish=finish)
            self._chooser(seed).restore()
            return found.candidates[0].name, found.plan
        return within(spec, self.source, self.seen(seed), nbytes, make=lambda turned: self.plan(turned, seed))

    def _choice(self, plan: Plan, seed: int) -> float:
        """What ``fit`` chooses by; its probes are the same at every size."""
        key = (plan.fingerprint, seed)
        if key not in self._choices:
            self._choices[key] = self._chooser(seed)(plan)
        return self._choices[key]

    def chosen_by(self, plan: Plan, seed: int) -> float:
        """A loss for methods that search: never on what judges."""
        return _measured(self._searcher(seed), plan)

    def losses(self, plan: Plan, seed: int) -> dict[str, float]:
        """KL divergence from the source on each domain's judging text, in nats per token."""
        key = (plan.fingerprint, seed)
        if key not in self._losses:
            self._losses[key] = {domain: _measured(judge, plan) for domain, judge in self._judges(seed).items()}
        return self._losses[key]

    def loss(self, plan: Plan, seed: int) -> float:
        """:meth:`losses`, domains weighing alike."""
        return float(np.mean(list(self.losses(plan, seed).values())))

    def _make_chooser(self, seed: int) -> LiveLoss:
        return LiveLoss(self.runner, self.source, self._choosing(seed))

    def _make_searcher(self, seed: int) -> LiveLoss:
        return LiveLoss(self.runner, self.source, evenly(self._choosing(seed), SEARCHED))

    def _make_judges(self, seed: int) -> dict[str, LiveLoss]:
        rows = self._judging(seed)
        return {domain: LiveLoss(self.runner, self.source, found) for domain, found in rows.items()}


def evenly(sequences: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Every n-th sequence, with n such that about so many tokens are left; all of them where there are no more."""
    total = sum(map(len, sequences))
    return list(sequences[:: max(1, round(total / tokens))])


def _measured(judge: LiveLoss, plan: Plan) -> float:
    """Several judges share the model: each leaves it as it was."""
    try:
        return judge(plan)
    finally:
        judge.restore()
