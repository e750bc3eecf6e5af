"""Sub-MoE (n 3): do experts whose outputs are alike merge better than others, and does their shared subspace help?

Setting: the embedded model, half of the experts kept, profiled on 4 KB of each of four domains per seed, judged by KL
divergence from the source on 1 KB of each domain's test split. All contestants keep every router row.

(i) Clusters of outputs, usage-weighted, against M-SMoE's merge (routing similarity) and against usage-weighted means of
random groups (4 draws, their mean), at no fewer experts.
(ii) The dagger variant at rank 32 and 16 (full rank: 64) against truncated SVD of each merged expert: the very same
clusters, the same ranks, so the same number of parameters.

Rule, written before the first run. `shown` if and only if the 95 % t interval over seeds of (baseline minus ours) lies
above zero for both baselines of (i) and, at both ranks, for (ii). Clusters no better than random ones, or a shared
whitened basis no better than SVD of each expert alone, falsify the claim. SVD of all experts unmerged, at rank 16 (as
many parameters as the dagger variant at 32), and pools of one and three layers are reported and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moekit.formats import LowRankBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._trial import Trial, by_method
from moekit.plan import LayerPlan, Plan, values
from moekit.plan.recombine import recombined

OURS, ROUTED, RANDOM, DRAWS = "sub-moe", "m-smoe", "random groups", 4
SPECS = {
    OURS: "sub-moe:keep=0.5",
    ROUTED: "m-smoe:keep=0.5",
    "pool of 1": "sub-moe:keep=0.5,pool=1",
    "pool of 3": "sub-moe:keep=0.5,pool=3",
}
RANKS = (32, 16)


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return KL by method and its gap to ours, for merging and for each rank. ``text`` is not used."""
    trial = Trial(calibration=4096, test=1024, sample=1024)
    merging: dict[str, list[float]] = {name: [] for name in (*SPECS, RANDOM)}
    cut: dict[str, dict[str, list[float]]] = {f"rank {rank}": {"dagger": [], "svd": []} for rank in RANKS}
    alone: list[float] = []
    experts: list[dict[str, int]] = []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        plans = {name: trial.plan(spec, seed) for name, spec in SPECS.items()}
        for name, plan in plans.items():
            merging[name].append(trial.loss(plan, seed))
        draws = [trial.plan(f"average:keep=0.5,seed={DRAWS * seed + i}", seed) for i in range(DRAWS)]
        merging[RANDOM].append(float(np.mean([trial.loss(plan, seed) for plan in draws])))
        experts.append({name: count(plan) for name, plan in (*plans.items(), (RANDOM, draws[0]))})
        for rank in RANKS:
            found = cut[f"rank {rank}"]
            found["dagger"].append(trial.loss(trial.plan(f"{SPECS[OURS]},rank={rank}", seed), seed))
            found["svd"].append(trial.loss(truncated(trial, plans[OURS], rank), seed))
        whole = {layer.name: LayerPlan.identity(layer.num_experts) for layer in trial.source.moe_layers}
        alone.append(trial.loss(truncated(trial, replace(plans[OURS], layers=whole), RANKS[1]), seed))
    figures = {
        "merging": by_method(merging, OURS),
        "cut": {name: by_method(losses, "dagger") for name, losses in cut.items()},
        "svd of all experts at rank 16": float(np.mean(alone)),
        "experts": experts[0],
    }
    return Outcome(shown=holds(figures), figures=figures, setting=trial.setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    likeness = all(figures["merging"][name]["gap"]["low"] > 0 for name in (ROUTED, RANDOM))
    return likeness and all(losses["svd"]["gap"]["low"] > 0 for losses in figures["cut"].values())


def truncated(trial: Trial, plan: Plan, rank: int) -> Plan:
    """The plan with every stored expert's matrices cut by truncated SVD, each alone."""
    layers = {}
    for name, layer in plan.layers.items():
        bank = LowRankBank.factorise(recombined(trial.source.bank(name), layer), rank)
        layers[name] = layer.valued(values.keep(bank))
    return replace(plan, layers=layers)


def count(plan: Plan) -> int:
    """Stored experts over all layers."""
    return sum(len(layer.experts) for layer in plan.layers.values())
