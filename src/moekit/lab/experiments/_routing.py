"""What experiments on changed routing share: a loss under rewrites, the slots they run, and draws to hold them against.

Shapes by suffix: T tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.bank import ExpertBank
from moekit.blocks import blocks
from moekit.blocks.rewriting import attach
from moekit.compress._sample import Sample
from moekit.compress._skip import kept_share, ratio_skip
from moekit.kernels.rewrites import BitWidths, Rewrite, Routed, keep_slots, rank_of
from moekit.lab.experiments._trial import Trial
from moekit.plan import LiveLoss, Plan
from moekit.profile import Profile

Rewrites = Mapping[str, Rewrite]
Banks = Mapping[str, ExpertBank]
Count = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Input, experts and weights of a batch -> how many slots each token runs, [T]."""


class Found(NamedTuple):
    """KL divergence from the source in nats per token, and the share of slots that ran."""

    kl: float
    kept: float


class Judge:
    """One seed's test text of all domains; what plans and rewrites cost on it."""

    def __init__(self, trial: Trial, seed: int) -> None:
        self.trial = trial
        rows = list(chain.from_iterable(trial.judging(seed).values()))
        self.live = LiveLoss(trial.runner, trial.source, rows)

    def whole(self) -> Plan:
        """The source itself."""
        return Plan(source=self.trial.source.fingerprint, layers={})

    def __call__(
        self, plan: Plan, rewrites: Rewrites | None = None, banks: Mapping[str, ExpertBank] | None = None
    ) -> Found:
        """Under a plan (its own rewrites left out), routed as ``rewrites`` say."""
        bare = replace(plan, layers={name: replace(layer, rewrite=None) for name, layer in plan.layers.items()})
        counted = {name: Counted(rewrite) for name, rewrite in (rewrites or {}).items()}
        with ExitStack() as stack:
            stack.callback(self.live.restore)
            self.live.become(bare)
            for block in blocks(self.trial.runner.model):
                if block.name in counted:
                    handle = attach(counted[block.name], block, None, (banks or {}).get(block.name))
                    stack.callback(handle.remove)
            kl = self.live(bare)
        ran = sum(one.ran for one in counted.values())
        return Found(kl, ran / max(sum(one.seen for one in counted.values()), 1) if counted else 1.0)


class _Tried(Rewrite):
    """A rewrite of an experiment: never stored. Where a bank is given it runs in the place of the block's own."""

    KIND, EXPANDS = "tried", True

    def describe(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Any:
        raise NotImplementedError


class Counted(_Tried):
    """Another rewrite, with a count of the slots that it saw and left."""

    def __init__(self, inner: Rewrite) -> None:
        super().__init__()
        self.inner, self.seen, self.ran = inner, 0, 0

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        x, index, weight = self.inner(x_TH, index_TK, weight_TK)
        self.seen, self.ran = self.seen + index_TK.numel(), self.ran + int((index >= 0).sum())
        return x, index, weight

    def runs(self, bank: Any) -> Any:
        return self.inner.runs(bank)


class Counts(_Tried):
    """The heaviest slots run, as many as a function of the batch says."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        keep = rank_of(weight_TK) < self.count(x_TH, index_TK, weight_TK)[:, None]
        return x_TH, *keep_slots(index_TK, weight_TK, keep, renormalise=True)


def dealt(rewrite: Rewrite, seed: int) -> Counts:
    """The numbers of slots that ``rewrite`` runs, dealt to other tokens of the batch at random."""
    draw = torch.Generator().manual_seed(seed)

    def count(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        ran_T = (rewrite(x_TH, index_TK, weight_TK)[1] >= 0).sum(1)
        return ran_T[torch.randperm(len(ran_T), generator=draw)]

    return Counts(count)


def fixed(slots: float, seed: int) -> Counts:
    """``slots`` per token: the whole number below it, and one more for as many random tokens as the mean needs."""
    draw = torch.Generator().manual_seed(seed)
    return Counts(lambda x, _, __: (slots + torch.rand(len(x), generator=draw)).floor().long())


class DealtWidths(_Tried):
    """The widths that learned heads choose, dealt to other slots of the batch at random."""

    def __init__(self, heads: BitWidths, seed: int) -> None:
        super().__init__()
        self.heads, self.draw = heads, torch.Generator().manual_seed(seed)

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        at = self.heads.choice(x_TH, index_TK)
        dealt_TK = at.flatten()[torch.randperm(at.numel(), generator=self.draw)].view_as(at)
        return x_TH, torch.where(index_TK >= 0, index_TK * len(self.heads.widths) + dealt_TK, -1), weight_TK

    def runs(self, bank: Any) -> Any:
        return self.heads.runs(bank)


def samples(seen: Profile) -> dict[str, Sample]:
    return {name: Sample.of(layer) for name, layer in seen.layers.items()}


def ratio_at(found: Mapping[str, Sample], share: float, protect: float = 0.0) -> dict[str, Rewrite]:
    """Ratio skipping in every layer, by the one quantile that runs a ``share`` of all slots of the samples."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        made = {name: ratio_skip(sample, middle, protect) for name, sample in found.items()}
        if mean_kept(made, found) > share:
            low = middle
        else:
            high = middle
    return dict(made)


def mean_kept(rewrites: Rewrites, found: Mapping[str, Sample]) -> float:
    """The share of slots that run, mean over layers."""
    return sum(kept_share(rewrites[name], sample) for name, sample in found.items()) / len(found)
