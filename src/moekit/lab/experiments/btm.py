"""BTM (n 119): is a set of models that never exchanged anything better than one trained on everything at equal compute?

Setting: small dense models of the stock kind (4 layers, hidden size 96, MLP 96 wide) from nothing, on four domains
(python, prose, c, translation), 200 steps of 1024 tokens in all. `dense`: all of it on all domains. BTM: a seed trained
for the first 100 steps of just that run; then four branches of 100 steps of 256 tokens, each on its domain, so that all
tokens are equal in number, with the same fall of the rate. `random split`: the same branches, each on all domains.
`from scratch`: four models of 200 steps of 256 tokens, each on its domain, begun from weights of its own. For each
domain judged, the cached prior comes from 4 KB of its calibration text; ensembles then weigh by exact Bayes inside each
window of 128. Judged in bits per byte on 4 KB of the test split of the four domains (`inside`), and of licences and
facts, which nobody trained on (`outside`). Bounds: the best single branch for each domain, and fixed weights fitted by
EM on the calibration text. Branches exchange nothing; the bytes of the seed and of the final gathering are counted by
formula.

Rule, written before the first run. `shown` if and only if, over seeds, on the mean over the four domains, the 95 % t
intervals of these lie above zero: (dense minus BTM ensemble), (random-split ensemble minus BTM ensemble), (plain
average of models from scratch minus plain average of branches). What is outside, weighted averages, uniform ensembles
and bounds are reported and decide nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.lab._recipe import RECIPES
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import LM, gap, means
from moekit.lab.experiments._outer_training import LENGTH, RATE, draws
from moekit.measure import windows
from moekit.parallel._outer_posterior import best_static, posteriors, told_of
from moekit.parallel.btm import average, cached_prior
from moekit.train import Batch, Batches, TrainOptions, distil
from moekit.train.options import Course

INSIDE, OUTSIDE = ("python", "prose", "c", "translation"), ("licences", "facts")
STEPS, SEED_STEPS, TOKENS, TEXT = 200, 100, 1024, 4096
SIZES: dict[str, Any] = {"hidden_size": 96, "num_layers": 4, "intermediate_size": 48, "top_k": 2}
DENSE, OURS, RANDOM = "dense", "btm", "random split"
SCRATCH = "from scratch"
EVEN = [1 / len(INSIDE)] * len(INSIDE)


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits per byte by contestant, inside and outside. ``text`` is not used."""
    found: dict[str, list[dict[str, float]]] = {"inside": [], "outside": []}
    numbers = 0
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        dense, families = trained(seed)
        numbers = sum(p.numel() for p in dense.parameters())
        scores = {domain: judged(dense, families, domain, seed) for domain in INSIDE + OUTSIDE}
        for where, domains in (("inside", INSIDE), ("outside", OUTSIDE)):
            names = scores[domains[0]]
            found[where].append({n: float(np.mean([scores[d][n] for d in domains])) for n in names})
    figures = {where: summary(runs) for where, runs in found.items()}
    copies = 4 * numbers * len(INSIDE)
    figures["bytes"] = {"seed_to_branches": copies, "between_branches": 0, "gathered_at_the_end": copies}
    setting = {"sizes": SIZES, "steps": STEPS, "seed_steps": SEED_STEPS, "tokens_per_step": TOKENS, "context": LENGTH}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Bits per byte, and the gaps that the rule asks for."""
    pairs = ((DENSE, OURS), (f"{RANDOM} ensemble", OURS), (f"{SCRATCH} average", f"{OURS} average"))
    return {
        "bits_per_byte": means(found),
        "gap": {f"{worse} minus {better}": gap(found, worse, full(better)) for worse, better in pairs},
    }


def full(name: str) -> str:
    """The contestant that stands for BTM is its ensemble."""
    return f"{OURS} ensemble" if name == OURS else name


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["inside"]["gap"].values())


def fresh(seed: int) -> Any:
    """A small dense model from nothing."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(replace(RECIPES["dense"], **SIZES).config(), dtype=torch.float32)


def trained(seed: int) -> tuple[Any, dict[str, list[Any]]]:
    """The dense model, and the families of branches by name."""
    start = fit(fresh(seed), rows(seed, INSIDE, TOKENS), 0, SEED_STEPS, seed)
    dense = fit(copy.deepcopy(start), rows(seed, INSIDE, TOKENS), SEED_STEPS, STEPS, seed)
    families: dict[str, list[Any]] = {OURS: [], RANDOM: [], SCRATCH: []}
    for i, domain in enumerate(INSIDE):
        draw, share = seed + 1000 * (i + 1), TOKENS // len(INSIDE)
        own, mixed = rows(draw, (domain,), share), rows(draw, INSIDE, share)
        families[OURS].append(fit(copy.deepcopy(start), own, SEED_STEPS, STEPS, seed))
        families[RANDOM].append(fit(copy.deepcopy(start), mixed, SEED_STEPS, STEPS, seed))
        families[SCRATCH].append(fit(fresh(draw), own, 0, STEPS, seed))
    return dense, families


def fit(model: Any, batches: Batches, begun: int, end: int, seed: int) -> Any:
    """Train in place from step ``begun`` to ``end`` of the one schedule: a constant rate, then one that falls."""
    stages: tuple[tuple[int, int, Course], ...] = ((0, SEED_STEPS, "constant"), (SEED_STEPS, STEPS, "cosine"))
    for first, last, course in stages:
        start, stop = max(first, begun), min(last, end)
        if start < stop:
            warmup = 0.1 if start == 0 else 0.0
            options = TrainOptions(
                steps=stop - start, learning_rate=RATE, course=course, warmup=warmup, weight_decay=0.1, seed=seed
            )
            distil(model, None, partial(_at, batches, start), options, LM)
    return model.eval()


def _at(batches: Batches, start: int, step: int) -> Batch:
    return batches(start + step)


def rows(seed: int, domains: Sequence[str], tokens: int) -> Batches:
    """Batches that draw from the domains alike."""
    return draws(seed, tokens, dict.fromkeys(domains, 1.0))


@cache
def tokenizer() -> Any:
    return Checkpoint.open("moekit:dense").tokenizer()


def judged(dense: Any, families: Mapping[str, Sequence[Any]], domain: str, seed: int) -> dict[str, float]:
    """Bits per byte of every contestant on one domain's test text; priors are from its calibration text."""
    test, dev = Rows(domain, "test", seed), Rows(domain, "calibration", seed)
    scores = {DENSE: test.bits(test.told([dense]), [1.0])}
    for name, branches in families.items():
        prior, told = cached_prior(branches, dev.rows), test.told(branches)
        averages = {"average": EVEN, "weighted average": prior}
        scores |= {
            f"{name} ensemble": test.bits(told, prior),
            f"{name} uniform, fixed": test.bits(told, EVEN, update=False),
        }
        scores |= {
            f"{name} {how}": test.bits(test.told([average(branches, weights)]), [1.0])
            for how, weights in averages.items()
        }
    told, branches = test.told(families[OURS]), families[OURS]
    scores[f"{OURS} fixed by EM"] = test.bits(told, best_static(torch.cat(dev.told(branches), -1)), update=False)
    scores[f"{OURS} best single branch"] = min(test.bits([t[j : j + 1] for t in told], [1.0]) for j in range(4))
    return scores


class Rows:
    """Windows of one domain's text."""

    def __init__(self, domain: str, split: str, seed: int) -> None:
        cut = windows([lab.text(domain, split, TEXT, seed)], tokenizer(), length=LENGTH, batch_size=1)
        self.rows, self.num_bytes = [batch["input_ids"][0] for batch in cut.batches], sum(cut.num_bytes)

    @torch.no_grad()
    def told(self, models: Sequence[Any]) -> list[Tensor]:
        """Of each window, the log-probabilities [J, S - 1] that each model gives to its tokens."""
        logits = ([model(input_ids=row[None]).logits for model in models] for row in self.rows)
        return [
            told_of(torch.stack(each).log_softmax(-1), row[None])[:, 0]
            for each, row in zip(logits, self.rows, strict=True)
        ]

    def bits(self, told: Sequence[Tensor], prior: Sequence[float] | Tensor, *, update: bool = True) -> float:
        """Bits per byte of the ensemble."""
        prior_J, nats = torch.as_tensor(prior, dtype=torch.float64), 0.0
        for each in told:
            weight = posteriors(each[:, None], prior_J)[:, 0, :-1] if update else prior_J.log()[:, None]
            nats -= float((weight + each.double()).logsumexp(0).sum())
        return nats / log(2) / self.num_bytes
