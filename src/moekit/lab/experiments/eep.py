"""EEP (n 44): does evolving which experts stay, and then their mixtures, beat the best of as many random draws?

Setting: the embedded model with half of its experts, 200 measurements for every search. For each seed and each of two
fitnesses: exact match on 60 prompts of arithmetic from the calibration split, judged on 300 prompts of the test split;
and negative KL divergence on 128 tokens of each of four domains' calibration text, judged on 2 KB of each test split.
EEP spends 100 measurements on pruning (30 of them random) and 100 on merging; best-of-N spends all 200 on random
subsets, of which the first 30 are the same. The mean of 8 random subsets says what one draw gives.

Rule, written before the first run. `shown` if and only if, for exact match on the test split, the 95 % t interval over
seeds of (EEP minus baseline) lies above zero for best-of-N and for a random draw, and the mean over seeds after merging
is no lower than after pruning alone. Best-of-N that ties falsifies the claim. KL divergence is reported and decides
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moekit import lab
from moekit.compress import method
from moekit.compress._fitness import TaskError
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._trial import Trial, by_method
from moekit.plan import LiveLoss, Plan

TASK, PROMPTS, ANSWERS, TOKENS = "arithmetic", 60, 300, 128
TOTAL, DISCRETE, INITIAL, DRAWS = 200, 100, 30, 8
MERGED, PRUNED, BEST, RANDOM = "pruned and merged", "pruned", "best of random", "random"
SEARCHES = {
    MERGED: f"evaluations={TOTAL},discrete={DISCRETE},initial={INITIAL}",
    PRUNED: f"evaluations={DISCRETE},discrete={DISCRETE},initial={INITIAL}",
    BEST: f"evaluations={TOTAL},discrete={TOTAL},initial={TOTAL}",
}
Measure = Callable[[Plan], float]


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return errors and KL on unseen text by search. ``text`` is not used."""
    trial = Trial()
    error: dict[str, list[float]] = {name: [] for name in (*SEARCHES, RANDOM)}
    divergence: dict[str, list[float]] = {name: [] for name in (*SEARCHES, RANDOM)}
    for done, seed in enumerate(seeds):
        advance(2 * done, 2 * len(seeds))
        fit, judge = wrong(trial, PROMPTS, "calibration", seed), wrong(trial, ANSWERS, "test", seed)
        for name, value in searched(trial, "error", fit, judge, seed).items():
            error[name].append(value)
        advance(2 * done + 1, 2 * len(seeds))
        rows = [trial.rows(trial.text(domain, "calibration", seed))[0][:TOKENS] for domain in trial.domains]
        fitness = LiveLoss(trial.runner, trial.source, rows)

        def judged(plan: Plan, seed: int = seed) -> float:
            return trial.loss(plan, seed)

        def measured(plan: Plan, fitness: LiveLoss = fitness) -> float:
            try:
                return fitness(plan)
            finally:
                fitness.restore()

        for name, value in searched(trial, "divergence", measured, judged, seed).items():
            divergence[name].append(value)
    figures = {"error": by_method(error, MERGED), "divergence": by_method(divergence, MERGED)}
    for found in figures["error"].values():
        found["error"] = found.pop("kl")
    return Outcome(shown=holds(figures), figures=figures, setting=trial.setting | {"task": TASK})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring; an error is one minus an exact match."""
    found = figures["error"]
    beats = all(found[name]["gap"]["low"] > 0 for name in (BEST, RANDOM))
    return bool(beats and found[MERGED]["error"]["mean"] <= found[PRUNED]["error"]["mean"])


def wrong(trial: Trial, count: int, split: str, seed: int) -> TaskError:
    return TaskError(trial.runner, trial.source, trial.tokenizer, lab.examples(TASK, split, count, seed))


def searched(trial: Trial, fitness: str, measure: Measure, judge: Measure, seed: int) -> dict[str, float]:
    """What the judge says of each search's choice. A plan is measured once, whichever search draws it."""
    known: dict[str, float] = {}

    def remembered(plan: Plan) -> float:
        if plan.fingerprint not in known:
            known[plan.fingerprint] = measure(plan)
        return known[plan.fingerprint]

    specs = {name: f"eep:keep=0.5,seed={seed},fitness={fitness},{counts}" for name, counts in SEARCHES.items()}
    chosen = {name: method(spec).plan(None, trial.source, remembered) for name, spec in specs.items()}
    found = {name: judge(plan) for name, plan in chosen.items()}
    draws = [method(f"random:keep=0.5,seed={DRAWS * seed + i}").plan(None, trial.source) for i in range(DRAWS)]
    return found | {RANDOM: float(np.mean([judge(plan) for plan in draws]))}
