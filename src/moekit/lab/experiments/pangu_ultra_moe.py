"""Pangu Ultra MoE (n 120): do simulated shapes rank as real ones, and does moving experts with drifting loads pay?

Setting, simulator: the law of single products is fitted on this machine; 12 random shapes of MoE layers (drawn by the
seed: 1 or 2 layers, H 64 to 384, 4 to 32 experts, top 1 to 4, inner 32 to 256, 128 tokens) are run on one thread in
processor time, as plain products with random routing, and predicted without having been used for the fit. Drift:
`moekit:mini`'s routing of held-out text, one domain after the other, in steps of 512 tokens, on 8 devices; rows of the
busiest device are counted, seconds per row and per expert moved come from the cost model for an expert of H 2048 and
inner 768 over the measured link (modelled). Static is balanced on the loads of the calibration text. Bytes: 8 devices
on 4 nodes of 2, contiguous placement, the same trace.

Rule, written before the first run. `shown` if and only if

1. over seeds, the rank correlation of predicted and real seconds is at least 0.9 (lower end of the 95 % t interval);
2. the interval of (static minus followed) in modelled seconds, moves counted, lies above zero as a share of static;
3. sending once per node takes fewer copies between nodes than the flat exchange, for every seed.

The paper's own claim, MFU on thousands of NPUs, cannot be tried on a CPU and is not. Moving every step by the true
loads (an oracle), loads in shuffled order, and gathering decide nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._placing import DOMAINS, Traces
from moekit.lab.experiments._seeds import over_seeds
from moekit.measure.machine import CostModel, fastest
from moekit.parallel._links import Grid
from moekit.parallel._placement_shape import Shape, step_seconds
from moekit.parallel._solver_greedy import balanced, contiguous
from moekit.parallel._traffic import Flow
from moekit.parallel.pangu_ultra_moe import PanguUltraMoE, between_nodes
from moekit.parallel.placement import Placement
from moekit.profile import RoutingTrace

SHAPES, TOKENS, STEP, SEQUENCES = 12, 128, 512, 48
DEVICES, NODES = 8, 4
HIDDEN, INNER = 2048, 768
LEAST = 0.9


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return rank correlation, modelled seconds under drift and copies between nodes. ``text`` is not used."""
    cost, traces, runs = CostModel.fit(), Traces(SEQUENCES), list[dict[str, Any]]()
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        seen, judged = traces.of(DOMAINS, "calibration", seed), traces.of(DOMAINS, "test", seed)
        placed = Placement(contiguous(seen.num_layers, seen.num_experts[0], DEVICES), Grid.of(DEVICES, NODES))
        sent = between_nodes(placed, judged)
        runs.append({"shapes": simulated(cost, seed), "drift": drifted(cost, seen, judged, seed), "sent": sent})
    setting = {**traces.setting, "cost model": cost.as_dict(), "date": time.strftime("%Y-%m-%d")}
    figures = {
        **over_seeds(runs),
        "every seed saves copies": all(r["sent"]["flat"] > r["sent"]["once per node"] for r in runs),
    }
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    ranks, saves = figures["shapes"]["rank correlation"]["low"] >= LEAST, figures["drift"]["followed saves"]["low"] > 0
    return bool(ranks and saves and figures["every seed saves copies"])


def simulated(cost: CostModel, seed: int) -> dict[str, float]:
    """Predicted against real seconds of random shapes."""
    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(SHAPES):
        experts = int(rng.choice([4, 8, 16, 32]))
        sizes = {"hidden": int(rng.integers(4, 25)) * 16, "inner": int(rng.integers(2, 17)) * 16}
        shapes.append(Shape(int(rng.integers(1, 3)), experts=experts, top_k=int(rng.integers(1, 5)), **sizes))
    real = np.array([real_seconds(shape, seed) for shape in shapes])
    predicted = np.array([step_seconds(shape, TOKENS, cost) for shape in shapes])
    off = np.abs(predicted / real - 1)
    return {
        "rank correlation": float(spearmanr(predicted, real).statistic),
        "mean error": float(off.mean()),
        "predicted over real": float(np.median(predicted / real)),
    }


def real_seconds(shape: Shape, seed: int) -> float:
    """Processor seconds of the fastest of some forward steps, one thread."""
    draw, threads = torch.Generator().manual_seed(seed), torch.get_num_threads()
    h, x = shape.hidden, torch.randn(TOKENS, shape.hidden, generator=draw)
    square, router = torch.randn(4, h, h, generator=draw), torch.randn(h, shape.experts, generator=draw)
    up = torch.randn(shape.experts, 2, h, shape.inner, generator=draw)
    down = torch.randn(shape.experts, shape.inner, h, generator=draw)

    def step() -> None:
        for _ in range(shape.layers):
            for weight in square:
                x @ weight
            chosen = (x @ router).topk(shape.top_k, 1).indices
            out = torch.zeros_like(x)
            for expert in range(shape.experts):
                rows = (chosen == expert).any(1).nonzero()[:, 0]
                own = x[rows]
                hidden = torch.nn.functional.silu(own @ up[expert, 0]) * (own @ up[expert, 1])
                out.index_add_(0, rows, hidden @ down[expert])

    torch.set_num_threads(1)
    try:
        return fastest(step, 5, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def drifted(cost: CostModel, seen: RoutingTrace, judged: RoutingTrace, seed: int) -> dict[str, float]:
    """Modelled seconds, as shares of static's, of following drifting loads and of its comparisons."""
    row = float(cost.expert(1000, HIDDEN, INNER) - cost.expert(0, HIDDEN, INNER)) / 1000
    move = float(cost.message(3 * HIDDEN * INNER * 2))
    order = np.random.default_rng(seed).permutation(len(judged))
    grid, loads = Grid.of(DEVICES), by_step(judged)
    static = balanced(Flow.of_trace(seen).counts, DEVICES)
    worst = busiest(static, loads) * row
    followed = PanguUltraMoE().drift(loads, grid, row, move)
    steady = PanguUltraMoE().drift(by_step(judged.take(order)), grid, row, move)
    oracle = sum(float(busiest(balanced(step, DEVICES), step[None])) for step in loads) * row
    return {
        "static imbalance": busiest(static, loads) * DEVICES / float(loads.sum()),
        "followed imbalance": float(followed.busiest.sum()) * DEVICES / float(loads.sum()),
        "experts moved per step": float(followed.moved.mean()),
        "followed saves": 1 - followed.seconds(row, move) / worst,
        "oracle with free moves saves": 1 - oracle / worst,
        "followed saves, shuffled": 1
        - steady.seconds(row, move) / (busiest(static, by_step(judged.take(order))) * row),
        "rows that one move must save": move / row,
    }


def by_step(trace: RoutingTrace) -> np.ndarray:
    """[S, L, E] loads of every 512 tokens in order; a rest is left out."""
    steps = len(trace) // STEP
    return np.stack([Flow.of_trace(trace.take(np.arange(s * STEP, (s + 1) * STEP))).counts for s in range(steps)])


def busiest(device: np.ndarray, loads_SLE: np.ndarray) -> float:
    """Rows of each layer's busiest device, summed over layers and steps."""
    return float(
        sum(np.bincount(d, load, DEVICES).max() for step in loads_SLE for d, load in zip(device, step, strict=True))
    )
