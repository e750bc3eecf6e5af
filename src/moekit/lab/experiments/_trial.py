"""What experiments on the embedded models share: profiles by seed, plans at equal bytes, and what a plan costs.

Calibration comes from the calibration split, judgement from the test split; a seed draws both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import Arena
from moekit.measure import Interval, exact_match, windows
from moekit.plan import LiveLoss, Plan
from moekit.profile import DEFAULT, Profile, profile
from moekit.stream import LoadedModel

DOMAINS = ("python", "prose", "c", "arithmetic")
LENGTH = 256


class Trial(Arena):
    """One embedded model in memory; see :class:`moekit.compress.Arena` for what can be asked of it.

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
        source = Checkpoint.open(model)
        super().__init__(source, LoadedModel.load(source, dtype=torch.float32), self)
        self.tokenizer = source.tokenizer()
        self.domains = tuple(domains)
        self.setting: dict[str, Any] = {
            "model": model,
            "fingerprint": source.fingerprint,
            "domains": list(domains),
        }
        self._sizes, self._sample = (calibration, test), sample
        self._statistics = tuple(dict.fromkeys((*DEFAULT, *statistics)))

    def text(self, domain: str, split: str, seed: int) -> str:
        return lab.text(domain, split, self._sizes[split == "test"], seed)

    def profile(self, seed: int) -> Profile:
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

    def choosing(self, seed: int) -> Sequence[np.ndarray]:
        return [np.asarray(piece) for pieces in self.seen(seed).held_out.values() for piece in pieces]

    def judging(self, seed: int) -> Mapping[str, Sequence[np.ndarray]]:
        return {domain: self.rows(self.text(domain, "test", seed)) for domain in self.domains}

    def rows(self, text: str) -> list[np.ndarray]:
        """Token sequences of at most :data:`LENGTH`."""
        found = windows([text], self.tokenizer, length=LENGTH)
        pairs = ((batch["input_ids"], batch["attention_mask"].bool()) for batch in found.batches)
        return [row[mask].numpy() for ids, masks in pairs for row, mask in zip(ids, masks, strict=True)]

    def exact(self, task: str, plan: Plan, count: int = 200, split: str = "test", seed: int = 0) -> float:
        """Share of a task's prompts answered exactly under the plan."""
        live = LiveLoss(self.runner, self.source, [np.zeros(2, dtype=np.int64)])
        live.become(plan)
        try:
            return exact_match(self.runner, self.tokenizer, lab.examples(task, split, count, seed)).mean
        finally:
            live.restore()


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
