"""EASY-EP (n 17): do a few sequences of one domain tell which half of the experts that domain needs?

Setting: the embedded model, one domain at a time (Python, prose, C headers, arithmetic, and the caller's own text if
given). For each seed: profile 25 sequences of 256 tokens from the calibration split, keep M of the 16 experts in every
layer by each method, forbid the others exactly, and measure bits per byte on 8192 bytes of the test split of the same
domain. Baselines at equal M: frequency, router probability, and 8 random draws (their mean).

Rule, written before the first run. `shown` if and only if, with half of the experts kept, all of these hold:

1. Averaged over the domains, EASY-EP's loss is below that of frequency, of router probability and of random pruning:
   the 95 % t interval over seeds of each difference (baseline minus EASY-EP) lies above zero. A tie with frequency
   over the seeds is what falsifies the claim.
2. In more than half of the domains the mean loss is below that of frequency.
3. The sets chosen from 25 sequences overlap with those from 250 other sequences of the domain by a Jaccard index above
   0.8, averaged over layers, domains and seeds.

Retention at a quarter kept is reported and decides nothing. Seeds vary the sequences and the draws; the model is one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from moekit import lab
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.lab.experiments import Advance, Outcome
from moekit.measure import Interval, bits_per_byte
from moekit.profile import Profile, profile
from moekit.stream import LoadedModel

DOMAINS = ("python", "prose", "c", "arithmetic")
FEW, MANY, LENGTH, TEST_BYTES = 25, 250, 256, 8192
KEEP = {"half": 0.5, "quarter": 0.25}
BASELINES = ("frequency", "router-probability", "random")
DRAWS = 8
NEEDED = ("counts", "probability", "contribution")
LEAST_JACCARD = 0.8

Kept = dict[str, frozenset[int]]
Draw = Callable[[int], tuple[list[str], list[str]]]


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return the figures and what the rule makes of them."""
    checkpoint = Checkpoint.open("moekit:mini")
    trial = Trial(checkpoint)
    draws: dict[str, Draw] = {domain: partial(_lab_text, domain) for domain in DOMAINS}
    if text is not None:
        draws["own"] = partial(_own_text, text)
    jobs = [(domain, seed) for domain in draws for seed in seeds]
    found: dict[str, list[dict[str, Any]]] = {domain: [] for domain in draws}
    for done, (domain, seed) in enumerate(jobs):
        advance(done, len(jobs))
        found[domain].append(trial.measure(*draws[domain](seed), seed))
    figures = summary(found)
    setting = {"model": "moekit:mini", "fingerprint": checkpoint.fingerprint, "sequences": FEW, "tokens": FEW * LENGTH}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    half = figures["half"]
    beats = all(half["gap"][name]["low"] > 0 for name in BASELINES)
    return bool(
        beats and 2 * half["domains_below_frequency"] > half["domains"] and figures["jaccard"]["mean"] > LEAST_JACCARD
    )


class Trial:
    """The model in memory, and what its loss becomes when experts are forbidden."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer()
        self.runner = LoadedModel.load(checkpoint, dtype=torch.float32)

    def measure(self, calibration: list[str], test: list[str], seed: int) -> dict[str, Any]:
        """One domain, one seed: `whole` loss, losses by share kept and method, Jaccard index of few against many."""
        few = self._profile(calibration[:FEW])
        result: dict[str, Any] = {"whole": self._loss(test, {})}
        for name, share in KEEP.items():
            plans = {m: self._keep(f"{m}:keep={share}", few) for m in ("easy-ep", "frequency", "router-probability")}
            losses = {m: self._loss(test, kept) for m, kept in plans.items()}
            picks = [self._keep(f"random:keep={share},seed={1000 * seed + i}", few) for i in range(DRAWS)]
            losses["random"] = sum(self._loss(test, kept) for kept in picks) / DRAWS
            result[name] = losses
        many = calibration[FEW:]
        if len(many) == MANY:
            ours, theirs = (self._keep("easy-ep:keep=0.5", seen) for seen in (few, self._profile(many)))
            result["jaccard"] = sum(len(ours[n] & theirs[n]) / len(ours[n] | theirs[n]) for n in ours) / len(ours)
        return result

    def _profile(self, pieces: list[str]) -> Profile:
        return profile(
            self.runner, {"domain": pieces}, sequence_length=LENGTH, held_out=0.0, sample=0, trace=0, statistics=NEEDED
        )

    def _keep(self, spec: str, seen: Profile) -> Kept:
        plan = method(spec).plan(seen, self.checkpoint)
        return {name: frozenset(layer.sources) for name, layer in plan.layers.items()}

    def _loss(self, test: list[str], kept: Kept) -> float:
        with ExitStack() as stack:
            for block in blocks(self.runner.model):
                if block.name in kept:
                    stack.enter_context(block.mask(sorted(kept[block.name])))
            return bits_per_byte(self.runner, test, self.tokenizer, length=LENGTH, batch_size=16)["text"].mean


def _pieces(body: str, count: int) -> list[str]:
    return [body[i * LENGTH : (i + 1) * LENGTH] for i in range(min(count, len(body) // LENGTH))]


def _lab_text(domain: str, seed: int) -> tuple[list[str], list[str]]:
    calibration = lab.text(domain, "calibration", 2 * (FEW + MANY) * LENGTH, seed)
    return _pieces(calibration, FEW + MANY), [lab.text(domain, "test", TEST_BYTES, seed)]


def _own_text(text: str, seed: int) -> tuple[list[str], list[str]]:
    """Seven tenths to calibrate on, in pieces drawn from the seed; a stretch of the rest to test on."""
    cut = len(text) * 7 // 10
    pieces = _pieces(text[:cut], cut)
    rng = random.Random(seed)
    rng.shuffle(pieces)
    start = rng.randrange(max(1, len(text) - cut - TEST_BYTES))
    return pieces[: FEW + MANY], [text[cut + start :][:TEST_BYTES]]


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Intervals over seeds: per domain, and of the mean over domains that the rule looks at."""
    figures: dict[str, Any] = {name: _share(found, name) for name in KEEP}
    overlaps = {domain: [r["jaccard"] for r in runs] for domain, runs in found.items() if "jaccard" in runs[0]}
    per_seed = [sum(values) / len(values) for values in zip(*overlaps.values(), strict=True)]
    figures["jaccard"] = asdict(Interval.over_seeds(per_seed)) | {
        domain: sum(values) / len(values) for domain, values in overlaps.items()
    }
    return figures


def _share(found: Mapping[str, Sequence[Mapping[str, Any]]], share: str) -> dict[str, Any]:
    """`gap`: baseline minus EASY-EP, mean over domains; `loss`: increase over the whole model, by domain and method."""
    domains: dict[str, Any] = {}
    for domain, runs in found.items():
        losses = {m: [run[share][m] - run["whole"] for run in runs] for m in ("easy-ep", *BASELINES)}
        domains[domain] = {m: asdict(Interval.over_seeds(values)) for m, values in losses.items()}
        domains[domain]["whole"] = sum(run["whole"] for run in runs) / len(runs)
    return {
        "gap": {name: asdict(Interval.over_seeds(list(_gaps(found, share, name)))) for name in BASELINES},
        "domains": len(found),
        "domains_below_frequency": sum(d["easy-ep"]["mean"] < d["frequency"]["mean"] for d in domains.values()),
        "increase": domains,
    }


def _gaps(found: Mapping[str, Sequence[Mapping[str, Any]]], share: str, baseline: str) -> Iterator[float]:
    for runs in zip(*found.values(), strict=True):
        yield sum(run[share][baseline] - run[share]["easy-ep"] for run in runs) / len(runs)
