"""PreMoe (n 34): does a query's routing in the first layer find its task, and do that task's experts serve it best?

Setting: the embedded model and the first four tasks of the lab (arithmetic, sorting, reversing, brackets). For each
seed: profile 8 KB of each task's calibration split, store one pattern per task; then retrieve the pattern of 50 unseen
prompts of each task from the first layer's routing of the prompt alone, and keep half of the experts by the right
pattern, by each wrong one, by frequency over all four tasks, and at random (8 draws). Judged by KL divergence from the
source on 2 KB of the task's test split, and reported as exact match on 100 unseen prompts.

Rule, written before the first run. `shown` if and only if all hold:

1. more than 95 % of the prompts find their own task's pattern, mean over tasks and seeds;
2. averaged over tasks, the 95 % t interval over seeds of (baseline minus right pattern) in KL lies above zero for the
   mean of the wrong patterns, for frequency over all tasks, and for the mean of the random draws.

Wrong-task patterns that do as well falsify the claim. Retrieval by chance would be right for 25 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit import lab
from moekit.compress.premoe import Patterns, marker
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._trial import Trial, by_method
from moekit.measure import Interval
from moekit.plan import Plan

TASKS = lab.TASKS[:4]
KEEP, PROMPTS, ANSWERS, DRAWS = 0.5, 50, 100, 8
RIGHT, WRONG, FREQUENCY, RANDOM = "right pattern", "wrong patterns", "frequency of all", "random"
LEAST_RIGHT = 0.95


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return retrieval accuracy, KL by pattern and exact match. ``text`` is not used: tasks are made by code."""
    trial = Trial(domains=TASKS)
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    losses: dict[str, list[float]] = {name: [] for name in (RIGHT, WRONG, FREQUENCY, RANDOM)}
    exact: dict[str, list[float]] = {name: [] for name in ("whole", RIGHT, WRONG)}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        patterns = Patterns.of(trial.seen(seed), trial.source)
        for task in TASKS:
            found[task].append(retrieved(trial, patterns, task, seed))
        for name, value in pruned(trial, patterns, seed).items():
            losses[name].append(value)
        for name, value in answered(trial, patterns, seed).items():
            exact[name].append(value)
    figures: dict[str, Any] = {
        "retrieved": vars(Interval.over_seeds(np.mean(list(found.values()), axis=0).tolist()))
        | {task: float(np.mean(values)) for task, values in found.items()},
        "half": by_method(losses, RIGHT),
        "exact match": {name: vars(Interval.over_seeds(values)) for name, values in exact.items()},
    }
    return Outcome(shown=holds(figures), figures=figures, setting=trial.setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    beats = all(figures["half"][name]["gap"]["low"] > 0 for name in (WRONG, FREQUENCY, RANDOM))
    return bool(beats and figures["retrieved"]["mean"] > LEAST_RIGHT)


def retrieved(trial: Trial, patterns: Patterns, task: str, seed: int) -> float:
    """Share of unseen prompts whose nearest pattern is their task's."""
    prompts = (prompt for prompt, _ in lab.examples(task, "test", PROMPTS, seed))
    queries = (np.array(trial.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    return float(np.mean([patterns.retrieve(marker(trial.runner, [ids])).task == task for ids in queries]))


def pruned(trial: Trial, patterns: Patterns, seed: int) -> dict[str, float]:
    """KL on each task's test text under its own pattern and under the others, mean over tasks."""
    plans = {task: patterns.plan(task, KEEP, trial.source) for task in TASKS}
    draws = [trial.plan(f"random:keep={KEEP},seed={DRAWS * seed + i}", seed) for i in range(DRAWS)]
    by_plan = {task: trial.losses(plan, seed) for task, plan in plans.items()}
    wrong = [by_plan[other][task] for task in TASKS for other in TASKS if other != task]
    return {
        RIGHT: float(np.mean([by_plan[task][task] for task in TASKS])),
        WRONG: float(np.mean(wrong)),
        FREQUENCY: trial.loss(trial.plan(f"frequency:keep={KEEP}", seed), seed),
        RANDOM: float(np.mean([trial.loss(plan, seed) for plan in draws])),
    }


def answered(trial: Trial, patterns: Patterns, seed: int) -> dict[str, float]:
    """Exact match on unseen prompts, mean over tasks; of the wrong patterns, the next task's."""
    whole = Plan(source=trial.source.fingerprint, layers={})
    own = {task: patterns.plan(task, KEEP, trial.source) for task in TASKS}
    following = dict(zip(TASKS, (*TASKS[1:], TASKS[0]), strict=True))

    def mean(plans: Mapping[str, Plan]) -> float:
        return float(np.mean([trial.exact(task, plan, ANSWERS, seed=seed) for task, plan in plans.items()]))

    return {
        "whole": mean(dict.fromkeys(TASKS, whole)),
        RIGHT: mean(own),
        WRONG: mean({task: own[other] for task, other in following.items()}),
    }
