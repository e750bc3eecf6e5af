"""MoEQuant (n 87): does text the model writes itself calibrate better, and do affinities make better rounding?

Setting: the embedded model, all experts at 3 bits in groups of 64. Calibration texts of 8192 tokens each, all of them
sampled in every layer: `self` (64 sequences of 128 tokens, written with expert-balanced self-sampling, width 4, tau
1.2), `prose` (one general corpus, as the paper's baselines have), `mixture` (the four domains that also judge, other
documents) and `noise` (bytes drawn uniformly). Every text calibrates both GPTQ (tokens alike) and affinity-guided GPTQ.
Judged on the test split of the four domains: KL divergence from the source, and the relative squared error of what the
MoE layers add. Rounding to nearest is reported.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of all three lie above zero:

1. imbalance (standard deviation of the experts' shares) of `mixture` minus that of `self`;
2. MoE-output error of GPTQ minus affinity-guided GPTQ, both on `mixture`. If affinities do not lower the output's error
   (not just that of single matrices), the claim is falsified;
3. KL of GPTQ on `prose` minus KL of the whole method, affinity-guided on `self`.

How `self` compares with `mixture`, a calibration made of the very domains that judge, and how much it repeats itself
is reported and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.compress import method
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._rounding import CALIBRATED, imbalance, output_error
from moekit.lab.experiments._seeds import each_seed
from moekit.lab.experiments._trial import DOMAINS, LENGTH, Trial, gap
from moekit.measure import Interval
from moekit.profile import Profile, profile, self_sampled_texts
from moekit.stream import LoadedModel

SEQUENCES, TOKENS, BITS = 64, 128, 3
METHODS = {"gptq": f"gptq:bits={BITS}", "affinity": f"moequant:bits={BITS}"}
TEXTS = ("self", "prose", "mixture", "noise")


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by calibration and method, and the three differences. ``text`` is not used."""
    trial = Trial(calibration=2 * SEQUENCES * TOKENS, test=4096)
    found = each_seed(seeds, advance, lambda seed: measure(trial, seed))
    figures = summary(found)
    setting = {**trial.setting, "bits": BITS, "tokens": SEQUENCES * TOKENS, "tau": 1.2, "width": 4}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def measure(trial: Trial, seed: int) -> dict[str, dict[str, float]]:
    """``kl`` and ``error`` by "method text", ``imbalance`` by text, shares of pairs in a sequence that differ."""
    assert isinstance(trial.runner, LoadedModel)
    written, repeats = self_sampled_texts(trial.runner, f"{SEQUENCES}x{TOKENS}", seed=seed)
    noise = np.random.default_rng(seed).integers(0, 256, (SEQUENCES, TOKENS))
    sources: dict[str, dict[str, Any]] = {
        "self": dict(written),
        "prose": {"prose": [trial.text("prose", "calibration", seed)]},
        "mixture": {domain: [trial.text(domain, "calibration", seed)] for domain in DOMAINS},
        "noise": {"noise": list(noise)},
    }
    judge = observe(trial, {domain: [trial.text(domain, "test", seed)] for domain in DOMAINS}, seed, length=LENGTH)
    result: dict[str, dict[str, float]] = {"kl": {}, "error": {}, "imbalance": {}}
    result["distinct pairs"] = {"self": repeats.distinct[1], "drawn plainly": repeats.plain_distinct[1]}
    plans = {"rtn": method(f"rtn:bits={BITS}").plan(None, trial.source)}
    for name in TEXTS:
        seen = observe(trial, sources[name], seed)
        result["imbalance"][name] = imbalance(seen)
        plans |= {f"{m} {name}": method(spec).plan(seen, trial.source) for m, spec in METHODS.items()}
    for name, plan in plans.items():
        result["kl"][name] = trial.loss(plan, seed)
        result["error"][name] = output_error(plan, trial.source, judge)
    return result


def observe(trial: Trial, texts: dict[str, Any], seed: int, length: int = TOKENS) -> Profile:
    """A profile of 8192 tokens, every one of them sampled."""
    tokens = SEQUENCES * TOKENS
    return profile(
        trial.runner, texts, max_tokens=tokens, sequence_length=length, held_out=0.0, tokenizer=trial.tokenizer,
        seed=seed, sample=tokens, trace=0, statistics=CALIBRATED,
    )  # fmt: skip


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Means over seeds, and the differences of the rule as intervals."""

    def each(kind: str, name: str) -> list[float]:
        return [one[kind][name] for one in found]

    means = {kind: {name: float(np.mean(each(kind, name))) for name in found[0][kind]} for kind in found[0]}
    rule = {
        "imbalance mixture - self": gap(each("imbalance", "mixture"), each("imbalance", "self")),
        "error gptq - affinity": gap(each("error", "gptq mixture"), each("error", "affinity mixture")),
        "kl gptq prose - affinity self": gap(each("kl", "gptq prose"), each("kl", "affinity self")),
    }
    beside = {
        "kl gptq mixture - affinity self": gap(each("kl", "gptq mixture"), each("kl", "affinity self")),
        "kl gptq mixture - affinity mixture": gap(each("kl", "gptq mixture"), each("kl", "affinity mixture")),
        "kl affinity noise - affinity self": gap(each("kl", "affinity noise"), each("kl", "affinity self")),
        "error gptq self - affinity self": gap(each("error", "gptq self"), each("error", "affinity self")),
    }
    return {"rule": _plain(rule), "beside": _plain(beside), **means}


def _plain(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: vars(interval) for name, interval in intervals.items()}
