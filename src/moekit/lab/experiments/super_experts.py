"""Super experts (n 7): does the embedded model have experts that carry its massive activations and attention sinks?

Setting: the embedded model, profiled on 8 KB of each of four domains per seed. Whom the detector names is silenced
(down projection at zero, routing as it was) and the KL divergence from the source on 2 KB of each domain's test split
is held against silencing as many experts drawn at random (16 draws from the layers the detector looks at). Where it
names nobody, the expert of largest output among these layers is silenced instead. Mass of attention on the first
token and the largest entry of the residual stream are measured before and after. Then the same on a planted variant:
the down projection of one expert per seed, drawn from the layers the detector looks at, is multiplied by 100; its
divergences are from the planted model itself.

Rule, written before the first run. `shown` if and only if in every seed the detector names at least one expert of the
embedded model itself, and silencing those loses more than every one of the 16 draws. An empty list, or random experts
that hurt as much, is `not-shown`. The planted variant must name exactly the planted expert; it is reported as a check
of the detector and decides nothing, because what was planted is found by construction.

Noted after the run of 2026-11-22, with rule and code as they were: one expert of the first layer is named in every seed
and silencing it loses 8.6 times as much as a random one, but in seed 11 one of the 16 draws is that very expert, which
the rule forgot to exclude, so that it cannot be beaten there. Nor is it what the paper describes: its largest output is
2.4 times the median, the first token draws 1 % of the attention, and the residual stream is as large without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress.premoe import partial_checkpoint
from moekit.compress.super_experts import silenced, sinks, super_experts
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._trial import DOMAINS, LENGTH
from moekit.measure import Interval, windows
from moekit.plan import LayerPlan, LiveLoss, Plan, values
from moekit.profile import profile
from moekit.stream import LoadedModel

DRAWS, TIMES, DEPTH = 16, 100.0, 0.75
CALIBRATION, TEST = 8192, 2048
Named = dict[str, list[int]]


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return who is named, what silencing costs, and the sinks, of the embedded model and of planted ones."""
    source = Checkpoint.open("moekit:mini")
    found: dict[str, list[dict[str, Any]]] = {"mini": [], "planted": []}
    for done, seed in enumerate(seeds):
        advance(2 * done, 2 * len(seeds))
        found["mini"].append(studied(source, seed))
        advance(2 * done + 1, 2 * len(seeds))
        layer, expert = drawn(source, 1, np.random.default_rng([7, seed]))[0]
        made = studied(partial_checkpoint(source, planted(source, layer, expert)), seed)
        found["planted"].append(made | {"exact": made["named"] == [f"{layer}: {expert}"]})
    figures = {name: summary(runs) for name, runs in found.items()}
    setting = {"model": "moekit:mini", "fingerprint": source.fingerprint, "domains": list(DOMAINS)}
    return Outcome(shown=holds(found["mini"]), figures=figures, setting=setting)


def holds(runs: Sequence[Mapping[str, Any]]) -> bool:
    """The rule of the module's docstring."""
    return all(run["named"] and run["silenced"] > max(run["random"]) for run in runs)


def studied(source: Checkpoint, seed: int) -> dict[str, Any]:
    """One model and seed: who is named (or else largest), and what silencing these and random ones does."""
    runner, tokenizer = LoadedModel.load(source, dtype=torch.float32), source.tokenizer()
    texts = {domain: [lab.text(domain, "calibration", CALIBRATION, seed)] for domain in DOMAINS}
    seen = profile(runner, texts, sequence_length=LENGTH, held_out=0.0, sample=0, trace=0, seed=seed)
    named = {name: [e for e in ids if e >= 0] for name, ids in super_experts(seen.layers, depth=DEPTH).items()}
    tests = [lab.text(domain, "test", TEST, seed) for domain in DOMAINS]
    rows = [np.array(b["input_ids"][0]) for b in windows(tests, tokenizer, length=LENGTH, batch_size=1).batches]
    judge, before = LiveLoss(runner, source, rows), sinks(runner, rows)
    peaks = {name: seen.layers[name].max_abs_down for name in early(source)}
    largest = max(peaks, key=lambda name: float(peaks[name].max()))
    muted = named or {largest: [int(peaks[largest].argmax())]}
    count, rng = sum(map(len, muted.values())), np.random.default_rng([17, seed])
    random = [judge(silenced(source, grouped(drawn(source, count, rng)))) for _ in range(DRAWS)]
    loss = judge(silenced(source, muted))
    after = sinks(runner, rows)
    judge.restore()
    everyone = np.concatenate(list(peaks.values()))
    return {
        "named": [f"{name}: {e}" for name, ids in named.items() for e in ids],
        "silenced": loss,
        "random": random,
        "peak over median": float(everyone.max() / np.median(everyone)),
        "sink mass": float(before.mass.mean()),
        "sink decay": before.decay(after),
        "massive": float(before.massive.max()),
        "massive after": float(after.massive.max()),
    }


def early(source: Checkpoint) -> list[str]:
    """The layers the detector looks at."""
    layers = [layer for layer in source.moe_layers if not layer.extra]
    return [layer.name for layer in layers[: round(DEPTH * len(layers))]]


def drawn(source: Checkpoint, count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """So many different experts of these layers."""
    every = [(name, e) for name in early(source) for e in range(source.layer(name).num_experts)]
    return [every[i] for i in rng.choice(len(every), count, replace=False)]


def grouped(experts: Sequence[tuple[str, int]]) -> Named:
    found: Named = {}
    for name, expert in experts:
        found.setdefault(name, []).append(expert)
    return found


def planted(source: Checkpoint, layer: str, expert: int) -> Plan:
    """The model with one expert's output ``TIMES`` as large."""
    bank = source.bank(layer)
    down = bank.down.clone()
    down[expert] *= TIMES
    whole = LayerPlan.identity(bank.num_experts, why="one expert's output is multiplied")
    made = whole.valued(values.keep(replace(bank, down=down)))
    return Plan(source=source.fingerprint, layers={layer: made})


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lists by seed of what is named, intervals of the rest; of the random draws their mean and largest."""
    figures: dict[str, Any] = {"named": [run["named"] for run in runs]}
    if "exact" in runs[0]:
        figures["names exactly the planted one"] = all(run["exact"] for run in runs)
    for name in ("silenced", "peak over median", "sink mass", "sink decay", "massive", "massive after"):
        figures[name] = vars(Interval.over_seeds([run[name] for run in runs]))
    for name, of in (("random mean", np.mean), ("random largest", np.max)):
        figures[name] = vars(Interval.over_seeds([float(of(run["random"])) for run in runs]))
    return figures
