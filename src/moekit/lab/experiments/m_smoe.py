"""M-SMoE (n 18): does merging by routing policy, weighted by usage, beat plainer averages, before and after recovery?

Setting: the embedded model, half of the experts kept, profiled on 2 KB of each of four domains per seed. Recovery is
the same for all: 12 steps of distillation from the source (KL, 512 tokens each, AdamW at 1e-3 falling to 0) of the
experts alone, those that share an expert trained as one; text of the calibration split, the same batches in the same
order. Judged by KL divergence from the source on 1 KB of each domain's test split. Baselines: the plain mean of random
groups; M-SMoE's own groups merged without aligning hidden units; M-SMoE's own groups merged by the plain mean. All keep
every router row; the random groups have no fewer experts.

Rule, written before the first run. `shown` if and only if, after recovery, the 95 % t interval over seeds of (baseline
minus M-SMoE) lies above zero for all three baselines. Usage weights no better than equal ones falsify the claim. Losses
without recovery, and the mean stable rank (||W||_F^2 / ||W||_2^2) of the merged matrices before and after recovery,
which the paper says falls, are reported and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._recovering import hold_tied, read_tied, recovered
from moekit.lab.experiments._trial import Trial, by_method
from moekit.measure import Interval
from moekit.plan import LayerPlan, Plan, StoredExpert
from moekit.plan.recombine import recombined

OURS, RANDOM, UNALIGNED, EQUAL = "m-smoe", "random groups", "not aligned", "equal weights"
STEPS = 12


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return KL by method before and after recovery, and the stable ranks. ``text`` is not used."""
    trial = Trial(calibration=2048, test=1024, sample=256)
    losses: dict[str, dict[str, list[float]]] = {"untrained": {}, "recovered": {}}
    ranks: dict[str, list[float]] = {"untrained": [], "recovered": []}
    for done, seed in enumerate(seeds):
        for number, (name, plan) in enumerate(contestants(trial, seed).items()):
            advance(4 * done + number, 4 * len(seeds))
            after = recovered(trial, plan, seed, STEPS, hold_tied, read_tied)
            for when, one in (("untrained", plan), ("recovered", after)):
                losses[when].setdefault(name, []).append(trial.loss(one, seed))
                if name == OURS:
                    ranks[when].append(stable_rank(trial, one))
    figures = {when: by_method(found, OURS) for when, found in losses.items()}
    figures["stable rank"] = {when: vars(Interval.over_seeds(found)) for when, found in ranks.items()}
    return Outcome(shown=holds(figures), figures=figures, setting={**trial.setting, "steps": STEPS})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(figures["recovered"][name]["gap"]["low"] > 0 for name in (RANDOM, UNALIGNED, EQUAL))


def contestants(trial: Trial, seed: int) -> dict[str, Plan]:
    """All of a seed."""
    ours = trial.plan("m-smoe:keep=0.5", seed)
    return {
        OURS: ours,
        RANDOM: trial.plan(f"average:keep=0.5,weights=uniform,seed={seed}", seed),
        UNALIGNED: trial.plan("m-smoe:keep=0.5,aligned=false", seed),
        EQUAL: replace(ours, layers={name: equal(layer) for name, layer in ours.layers.items()}),
    }


def equal(layer: LayerPlan) -> LayerPlan:
    """The same groups and orders, all parts weighing alike."""
    experts = [
        StoredExpert(tuple((e, 1 / len(one.parts)) for e, _ in one.parts), orders=one.orders) for one in layer.experts
    ]
    return replace(layer, experts=tuple(experts))


def stable_rank(trial: Trial, plan: Plan) -> float:
    """Squared Frobenius norm over squared largest singular value, mean over layers, stored experts and both stacks."""
    found: list[float] = []
    for name, layer in plan.layers.items():
        bank = recombined(trial.source.bank(name), layer)
        for stack in (bank.gate_up.float(), bank.down.float()):
            found += (stack.square().sum((1, 2)) / torch.linalg.matrix_norm(stack, ord=2) ** 2).tolist()
    return float(np.mean(found))
