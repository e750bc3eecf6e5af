"""Affinity placement of any size: exactly where that is affordable, else by search with a proven bound; in stages.

A stage cuts the experts into parts and then solves each part on its own, so that nodes come before the devices in
them (few pairs between nodes matter more than few between devices), or so that 8 devices are three halvings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moekit.parallel import _solver_bound, _solver_layers, _solver_local
from moekit.parallel._solver import Solved, apart

Solve = Callable[[np.ndarray, int], Solved]
"""(pairs, devices) -> the answer."""


def solve(pairs: np.ndarray, devices: int, *, seed: int = 0) -> Solved:
    """The optimum where one layer can be placed in few ways, else the best found and a semidefinite bound."""
    if _solver_layers.work(len(pairs) + 1, pairs.shape[1], devices) <= _solver_layers.LIMIT:
        return _solver_layers.solve(pairs, devices)
    device = _solver_local.search(pairs, devices, seed=seed)
    return Solved(device, apart(pairs, device), _solver_bound.bound(pairs, devices))


def bound(pairs: np.ndarray, devices: int) -> float:
    """No placement has fewer pairs apart: the optimum where that is affordable, else a semidefinite bound."""
    if _solver_layers.work(len(pairs) + 1, pairs.shape[1], devices) <= _solver_layers.LIMIT:
        return _solver_layers.solve(pairs, devices).bound
    return _solver_bound.bound(pairs, devices)


def staged(pairs: np.ndarray, parts: Sequence[int], solver: Solve) -> tuple[np.ndarray, Solved]:
    """[L, E] devices, and the answer of the first stage, which cuts into ``parts[0]``; the next cuts each of those
    into ``parts[1]`` and so on. Parts are numbered in order: devices of a node follow each other."""
    first = solver(pairs, parts[0])
    device = first.device
    for count in parts[1:]:
        finer = np.zeros_like(device)
        for part in np.unique(device):
            chosen_LE = np.stack([np.flatnonzero(row == part) for row in device])
            inside = pairs[np.arange(len(pairs))[:, None, None], chosen_LE[:-1, :, None], chosen_LE[1:, None]]
            np.put_along_axis(finer, chosen_LE, part * count + solver(inside, count).device, axis=1)
        device = finer
    return device, first
