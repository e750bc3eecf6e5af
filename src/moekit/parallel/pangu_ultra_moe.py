"""Pangu Ultra MoE: simulate shapes before training them, send a token once per node, move experts as loads drift.

Paper: Pangu Ultra MoE: How to Train Your Big MoE on Ascend NPUs, 2025 (n 120, arXiv 2505.04519).
Method: (1) a step's time is the sum of its operators' measured laws; (2) a token goes once to every other node that
    keeps one of its experts and inside it to the devices, where a flat exchange sends one copy per device; gathering
    all tokens of a node's peers sends nodes - 1; (3) loads are predicted by a window of recent steps, and experts are
    placed anew when busiest-device rows x seconds per row x window saved exceed experts moved x seconds per expert.
    Besides: the balance loss takes f and P over all tokens of an expert-parallel group; norms on both sides of every
    sublayer, the outer one's gain begun at c / sqrt(L), and matrices begun with deviation sqrt(1 / (2 d L)).
Uses: parallel._placement_shape, parallel._solver_greedy, parallel._group_balance, parallel._sandwich, measure.machine;
    the exchange itself is parallel.exchange
Differs: from the abstract and summaries of the report, so (3)'s window and threshold are ours, and devices keep equal
    counts of experts. Swapping and overlap are not here. The balance loss and the norms are checked, not tried.
    Operators are measured on a CPU; nothing is said about NPUs.
Claim: MFU from 18.9 % to 30.0 %, 0.61 M to 1.46 M tokens per second on 4,000 to 6,000 NPUs.
Shown: lab.experiments.pangu_ultra_moe
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from moekit.errors import OptionError
from moekit.parallel._links import Grid
from moekit.parallel._solver_greedy import balanced, contiguous
from moekit.parallel.placement import Placement
from moekit.profile import RoutingTrace


@dataclass(frozen=True)
class Drift:
    """Per step: ``busiest`` [S] rows of the busiest device, summed over layers; ``moved`` [S] experts moved before."""

    busiest: np.ndarray
    moved: np.ndarray

    def seconds(self, row: float, move: float) -> float:
        """Modelled: busiest rows and moves, nothing overlapped."""
        return float(self.busiest.sum() * row + self.moved.sum() * move)


@dataclass(frozen=True, kw_only=True)
class PanguUltraMoE:
    """``window``: steps of the past that predict the next ones, and for how many a move must pay."""

    window: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"pangu-ultra-moe: window={self.window} predicts nothing: give 1 or more steps")

    def drift(self, loads_SLE: np.ndarray, grid: Grid, row: float, move: float) -> Drift:
        """Run through steps of loads; a layer is placed anew where that pays by what was seen before the step.

        ``row`` and ``move`` are seconds per row and per expert moved. The first step runs on contiguous placement.
        """
        steps, layers, experts = loads_SLE.shape
        device = contiguous(layers, experts, grid.world)
        busiest, moved = np.zeros(steps), np.zeros(steps)
        for step in range(steps):
            if step:
                expected = loads_SLE[max(0, step - self.window) : step].mean(0)
                device, moved[step] = self.moved(device, expected, grid, row, move)
            busiest[step] = _busiest(device, loads_SLE[step], grid.world).sum()
        return Drift(busiest, moved)

    def moved(
        self, device: np.ndarray, expected: np.ndarray, grid: Grid, row: float, move: float
    ) -> tuple[np.ndarray, int]:
        """[L, E] devices for expected loads [L, E], and how many experts that moves."""
        wanted = np.stack(
            [kept_names(a, b, grid.world) for a, b in zip(device, balanced(expected, grid.world), strict=True)]
        )
        moves = (wanted != device).sum(1)
        saved = _busiest(device, expected, grid.world) - _busiest(wanted, expected, grid.world)
        pays = saved * row * self.window > moves * move
        return np.where(pays[:, None], wanted, device), int(moves[pays].sum())


def kept_names(before: np.ndarray, after: np.ndarray, devices: int) -> np.ndarray:
    """``after`` [E] with its devices renamed so that as many experts as possible stay where they were."""
    stays = np.zeros((devices, devices))
    np.add.at(stays, (after, before), 1)
    return np.asarray(linear_sum_assignment(-stays)[1])[after]


def _busiest(device: np.ndarray, loads: np.ndarray, devices: int) -> np.ndarray:
    """[L] rows of each layer's busiest device."""
    return np.array([np.bincount(d, load, devices).max() for d, load in zip(device, loads, strict=True)])


def between_nodes(placement: Placement, trace: RoutingTrace) -> dict[str, float]:
    """Copies between nodes per token and layer, one way: flat, at most one per node, and gathering everything.

    A token's home is its sequence's number modulo P, as under plain expert parallelism.
    """
    grid, flat, once = placement.grid, 0, 0
    home = trace.sequence % grid.world // grid.per_node
    for layer in range(trace.num_layers):
        where = np.append(placement.device[layer], -1)[trace.expert[:, layer]]
        on = (where[:, :, None] == np.arange(grid.world)).any(1)
        away = (np.arange(grid.world) // grid.per_node)[None] != home[:, None]
        flat += int((on & away).sum())
        once += int((on & away).reshape(len(on), grid.nodes, grid.per_node).any(2).sum())
    calls = max(len(trace) * trace.num_layers, 1)
    return {"flat": flat / calls, "once per node": once / calls, "gathered": float(grid.nodes - 1)}
