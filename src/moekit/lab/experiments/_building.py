"""What experiments that train share: batches of the embedded models' training mixture, and a loss on unseen text.

Every contestant of a seed sees the same batches in the same order and is judged on the same text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit import lab
from moekit.build._write import load_dense
from moekit.checkpoint import Checkpoint
from moekit.lab._batches import text_tokens
from moekit.measure import Interval, bits_per_byte
from moekit.stream import LoadedModel
from moekit.train import Batch, Batches, Objective, TrainOptions, distil

TOKENS, LENGTH, TEST_BYTES, DOMAIN_BYTES = 512, 128, 2048, 8192
LM = Objective(kl=0.0, lm=1.0)
ELSEWHERE = 7919
"""Added to a seed: text that is not the judge's."""


class Ground:
    """The dense sibling in float32, training batches and test text by seed.

    With a ``domain``, training and test text are of that domain alone: something new to learn in few steps.
    """

    def __init__(self, domain: str | None = None) -> None:
        self.domain = domain
        self.source = Checkpoint.open("moekit:dense")
        self.tokenizer = self.source.tokenizer()
        self._dense = load_dense(self.source)
        self.setting = {
            "model": "moekit:dense",
            "fingerprint": self.source.fingerprint,
            "tokens_per_step": TOKENS,
            "context": LENGTH,
            "domain": domain or "all",
            "test_bytes_per_domain": DOMAIN_BYTES if domain else TEST_BYTES,
        }

    def dense(self) -> Any:
        """A copy of the dense model, to be changed."""
        return copy.deepcopy(self._dense)

    def batches(self, seed: int) -> Batches:
        if self.domain is not None:
            return one_domain(self.domain, seed, TOKENS, LENGTH)
        return lab.mixture(seed, TOKENS, LENGTH)

    def rows(self, seed: int, count: int) -> list[Tensor]:
        """Token rows of the training mixture, for calibration."""
        batches, rows = self.batches(seed + ELSEWHERE), list[Tensor]()
        while len(rows) < count:
            rows += list(batches(len(rows))["input_ids"])
        return rows[:count]

    def loss(self, model: Any, seed: int) -> float:
        """Bits per byte on the test split, mean over the domains."""
        domains = lab.DOMAINS if self.domain is None else (self.domain,)
        size = TEST_BYTES if self.domain is None else DOMAIN_BYTES
        texts = {domain: [lab.text(domain, "test", size, seed)] for domain in domains}
        runner = LoadedModel(model)
        scores = bits_per_byte(runner, texts, self.tokenizer, length=LENGTH, batch_size=16)
        return sum(score.mean for score in scores.values()) / len(scores)

    def fit(self, model: Any, seed: int, steps: int, rate: float, what: Sequence[str], **more: Any) -> Any:
        """Train in place on text (or as ``teacher`` and ``objective`` say) and return the model.

        ``start`` is the number of steps already made, so that a second stage goes on where the first ended.
        """
        objective, start, batches = more.pop("objective", LM), more.pop("start", 0), self.batches(seed)
        options = TrainOptions(steps=steps, learning_rate=rate, course="cosine", seed=seed)
        distil(
            model, more.pop("teacher", None), lambda step: batches(start + step), options, objective, what=what, **more
        )
        return model


def one_domain(domain: str, seed: int, tokens: int, length: int) -> Batches:
    """Batches of windows of one text domain's training split."""
    stream = text_tokens(domain, "train")

    def batch(step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(stream) - length - 1, size=tokens // length)
        windows = np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64)
        return {"input_ids": torch.from_numpy(windows)}

    return batch


def gap(found: Sequence[Mapping[str, float]], worse: str, better: str) -> dict[str, float]:
    """Interval over seeds of one contestant's figure minus another's, seed by seed."""
    return asdict(Interval.over_seeds([run[worse] - run[better] for run in found]))


def means(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Interval over seeds of every contestant's figure."""
    return {name: asdict(Interval.over_seeds([run[name] for run in found])) for name in found[0]}


@torch.no_grad()
def keep_units(ffn: Any, units: Tensor) -> None:
    """Leave only these hidden units of a dense layer, in place."""
    module = ffn.module
    for child, cut in ((module.gate_proj, 0), (module.up_proj, 0), (module.down_proj, 1)):
        child.weight = torch.nn.Parameter(child.weight.index_select(cut, units).contiguous())
