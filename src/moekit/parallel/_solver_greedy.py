"""Placements without an optimiser: contiguous, random, and balanced by longest processing time first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moekit.parallel._links import Grid
from moekit.parallel._solver import per_device
from moekit.parallel._traffic import Flow, imbalance
from moekit.parallel.placement import Placed, Placement, Placer


def contiguous(num_layers: int, num_experts: int, devices: int) -> np.ndarray:
    """[L, E] the first experts on device 0 and so on, in every layer alike: what frameworks do."""
    return np.tile(np.arange(num_experts) // per_device(num_experts, devices), (num_layers, 1))


def scattered(num_layers: int, num_experts: int, devices: int, seed: int = 0) -> np.ndarray:
    """[L, E] every layer dealt evenly at random."""
    rng = np.random.default_rng(seed)
    layer = np.arange(num_experts) // per_device(num_experts, devices)
    return np.stack([rng.permutation(layer) for _ in range(num_layers)])


def balanced(counts: np.ndarray, devices: int) -> np.ndarray:
    """[L, E] by ``counts`` [L, E]: experts in decreasing load, each to the least loaded device that has room."""
    each = per_device(counts.shape[1], devices)
    device = np.zeros(counts.shape, int)
    for layer, loads in enumerate(counts):
        load, room = np.zeros(devices), np.full(devices, each)
        for expert in np.argsort(-loads, kind="stable"):
            best = int(np.where(room > 0, load, np.inf).argmin())
            device[layer, expert] = best
            load[best] += loads[expert]
            room[best] -= 1
    return device


def least_imbalance(counts: np.ndarray, devices: int) -> float:
    """A lower bound of the busiest device over the mean, mean over layers: an expert is not split, and with m experts
    on each device the busiest has at least what the lightest m - 1 leave to the heaviest."""
    each = per_device(counts.shape[1], devices)
    ordered = np.sort(counts, axis=1)
    with_heaviest = ordered[:, -1] + ordered[:, : each - 1].sum(1)
    mean = np.maximum(counts.sum(1) / devices, 1e-30)
    return float(np.maximum(with_heaviest / mean, 1.0).mean())


@dataclass(frozen=True, kw_only=True)
class Baseline(Placer):
    """``kind`` is contiguous, random (drawn by ``seed``) or balanced."""

    kind: str = "contiguous"
    seed: int = 0

    def place(self, flow: Flow, grid: Grid) -> Placed:
        size = (flow.num_layers, flow.num_experts, grid.world)
        if self.kind == "random":
            device = scattered(*size, seed=self.seed)
        else:
            device = contiguous(*size) if self.kind == "contiguous" else balanced(flow.counts, grid.world)
        value = {"crossing": flow.crossing(device), "imbalance": imbalance(flow.rows(device, grid.world))}
        bound = {"imbalance": least_imbalance(flow.counts, grid.world)}
        return Placed(Placement(device, grid), self.kind, value, bound)
