"""DERN (n 20): does handing the neurons of dropped experts to kept ones lose less than dropping them?

Setting: the embedded model, half of the experts of every layer kept by the probability of the chosen, profiled on 8
KB of each of four domains per seed, judged by KL divergence from the source on 2 KB of each domain's test split.
Baselines: plain pruning with the very same experts kept (alpha above 1 is that, exactly); experts averaged whole by
usage, in random groups (mean of 4 draws) and in M-SMoE's groups without alignment. The latter two keep all router
rows, a little more than the same bytes.

Rule, written before the first run. `shown` if and only if, with the default alpha of 0.4, the 95 % t interval over
seeds of (baseline minus DERN) lies above zero for plain pruning with the same set and for both averagings. Alpha 0.4
no better than alpha 1.01 falsifies the claim. Other alphas, the mean of three cosines and the sign-canonical cosine
are reported and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._trial import Trial, by_method

OURS, PLAIN = "alpha=0.4", "alpha=1.01"
DERN = {f"alpha={alpha}": f"dern:keep=0.5,alpha={alpha}" for alpha in ("-1.0", "0.2", "0.4", "0.8", "1.01")} | {
    "mean of cosines": "dern:keep=0.5,likeness=mean",
    "canonical": "dern:keep=0.5,canonical=true",
}
WHOLE = {"grouped averages": "m-smoe:keep=0.5,aligned=false"}
AVERAGES, DRAWS = "random averages", 4


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return KL by method, its gap to DERN's, and how many neurons found a new home. ``text`` is not used."""
    trial = Trial()
    losses: dict[str, list[float]] = {name: [] for name in (*DERN, *WHOLE, AVERAGES)}
    moved: dict[str, list[float]] = {name: [] for name in DERN}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        for name, spec in (DERN | WHOLE).items():
            plan = trial.plan(spec, seed)
            losses[name].append(trial.loss(plan, seed))
            if name in DERN:
                moved[name].append(adopted(plan.layers))
        draws = [trial.plan(f"average:keep=0.5,seed={DRAWS * seed + i}", seed) for i in range(DRAWS)]
        losses[AVERAGES].append(float(np.mean([trial.loss(plan, seed) for plan in draws])))
    figures = by_method(losses, OURS)
    for name, shares in moved.items():
        figures[name]["neurons moved"] = float(np.mean(shares))
    return Outcome(shown=holds(figures), figures=figures, setting=trial.setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(figures[name]["gap"]["low"] > 0 for name in (PLAIN, AVERAGES, *WHOLE))


def adopted(layers: Mapping[str, Any]) -> float:
    """Share of the dropped experts' neurons that joined a kept one, mean over layers."""
    each = []
    for layer in layers.values():
        given = sum(share for expert in layer.experts for _, share in expert.parts[1:])
        each.append(given / (layer.num_experts - len(layer.experts)))
    return float(np.mean(each))
