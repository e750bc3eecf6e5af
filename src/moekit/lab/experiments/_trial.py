"""What experiments on the embedded models share: profiles by seed, plans at equal bytes, and what a plan costs.

Calibration comes from the calibration split, judgement from the test split; a seed draws both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import chain, within
from moekit.measure import Interval, exact_match, windows
from moekit.plan import LiveLoss, Plan, make_plan
from moekit.plan.sizes import plan_nbytes, source_nbytes
from moekit.profile import DEFAULT, Profile, profile
from moekit.stream import LoadedModel

DOMAINS = ("python", "prose", "c", "arithmetic")
LENGTH = 256


class Trial:
    """One embedded model in memory; every answer is remembered, so that methods share their baselines' runs.

    ``calibration`` and ``test`` are bytes of text per domain, ``sample`` tokens a profile keeps per layer, and
    ``statistics`` more than the default ones.
    """

    def __init__(
        self,
        model: str = "moekit:mini",
        domains: Sequence[str] = DOMAINS,
        *,
        calibration: int = 8192,
        test: int = 2048,
        sample: int = 4096,
        statistics: Sequence[str] = (),
    ) -> None:
        self.source = Checkpoint.open(model)
        self.tokenizer = self.source.tokenizer()
        self.runner = LoadedModel.load(self.source, dtype=torch.float32)
        self.domains = tuple(domains)
        self.setting: dict[str, Any] = {
            "model": model,
            "fingerprint": self.source.fingerprint,
            "domains": list(domains),
        }
        self._sizes, self._sample = (calibration, test), sample
        self._statistics = tuple(dict.fromkeys((*DEFAULT, *statistics)))
        self._losses: dict[tuple[str, int], dict[str, float]] = {}
        self.seen = cache(self._seen)
        self._judges = cache(self._make_judges)
        self._choosing = cache(self._make_choosing)

    def text(self, domain: str, split: str, seed: int) -> str:
        return lab.text(domain, split, self._sizes[split == "test"], seed)

    def plan(self, spec: str, seed: int) -> Plan:
        """The plan of ``A/B/...`` with these options, from the seed's profile."""
        return make_plan(chain(spec), self.source, self.seen(seed), self.choosing(seed))

    def within(self, spec: str, seed: int, nbytes: int) -> tuple[str, Plan] | None:
        """The largest setting of ``A/B/...`` that takes at most so many bytes; see :func:`moekit.compress.within`."""
        return within(spec, self.source, self.seen(seed), nbytes, self.choosing(seed))

    def nbytes(self, plan: Plan) -> int:
        """Bytes of the weight files the plan makes."""
        return plan_nbytes(plan, self.source)

    @property
    def whole_bytes(self) -> int:
        return source_nbytes(self.source)

    def choosing(self, seed: int) -> Callable[[Plan], float]:
        """A loss for methods that search: on calibration text the profile kept aside."""
        return lambda plan: _measured(self._choosing(seed), plan)

    def losses(self, plan: Plan, seed: int) -> dict[str, float]:
        """KL divergence from the source on each domain's test text, nats per token."""
        key = (plan.fingerprint, seed)
        if key not in self._losses:
            self._losses[key] = {domain: _measured(judge, plan) for domain, judge in self._judges(seed).items()}
        return self._losses[key]

    def loss(self, plan: Plan, seed: int) -> float:
        """:meth:`losses`, domains weighing alike."""
        return float(np.mean(list(self.losses(plan, seed).values())))

    def exact(self, task: str, plan: Plan, count: int = 200, split: str = "test", seed: int = 0) -> float:
        """Share of a task's prompts answered exactly under the plan."""
        judge = next(iter(self._judges(0).values()))
        judge.become(plan)
        try:
            return exact_match(self.runner, self.tokenizer, lab.examples(task, split, count, seed)).mean
        finally:
            judge.restore()

    def _seen(self, seed: int) -> Profile:
        return profile(
            self.runner,
            {domain: [self.text(domain, "calibration", seed)] for domain in self.domains},
            sequence_length=LENGTH,
            held_out=0.25,
            tokenizer=self.tokenizer,
            seed=seed,
            sample=self._sample,
            statistics=self._statistics,
        )

    def _make_choosing(self, seed: int) -> LiveLoss:
        pieces = [np.asarray(piece) for pieces in self.seen(seed).held_out.values() for piece in pieces]
        return LiveLoss(self.runner, self.source, pieces)

    def _make_judges(self, seed: int) -> dict[str, LiveLoss]:
        texts = {domain: self.text(domain, "test", seed) for domain in self.domains}
        return {domain: LiveLoss(self.runner, self.source, self.rows(text)) for domain, text in texts.items()}

    def rows(self, text: str) -> list[np.ndarray]:
        """Token sequences of at most :data:`LENGTH`."""
        found = windows([text], self.tokenizer, length=LENGTH)
        pairs = ((batch["input_ids"], batch["attention_mask"].bool()) for batch in found.batches)
        return [row[mask].numpy() for ids, masks in pairs for row, mask in zip(ids, masks, strict=True)]


def _measured(judge: LiveLoss, plan: Plan) -> float:
    """Several judges share the model: each leaves it as it was."""
    try:
        return judge(plan)
    finally:
        judge.restore()


def gap(baseline: Sequence[float], ours: Sequence[float]) -> Interval:
    """Baseline minus ours, paired by seed: above zero where ours loses less."""
    return Interval.over_seeds([b - o for b, o in zip(baseline, ours, strict=True)])


def by_method(losses: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """For JSON: mean and interval of every method over seeds, and of its gap to ``ours``."""
    found: dict[str, Any] = {}
    for name, values in losses.items():
        found[name] = {"kl": vars(Interval.over_seeds(values))}
        if name != ours:
            found[name]["gap"] = vars(gap(values, losses[ours]))
    return found
