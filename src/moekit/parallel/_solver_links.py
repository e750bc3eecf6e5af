"""Giving clusters of experts to devices, layer by layer, so that the busiest link of each step is least busy.

``flow`` [L-1, G, G]: tokens from cluster c1 of a layer to c2 of the next; ``slowness`` [G, G]: seconds per token on the
link between two devices (relative ones will do). Minimise sum_l max over g1 != g2 of flow * slowness, one cluster per
device in every layer, and over all layers at most ``room`` experts on a device. Shapes by suffix: L layers, G devices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Arrangement = np.ndarray
"""[L, G] int: the device of every cluster."""


def busiest(flow: np.ndarray, slowness: np.ndarray, device: Arrangement) -> float:
    """The objective."""
    return sum(_step(table, slowness, a, b) for table, (a, b) in zip(flow, pairwise(device), strict=True))


def _step(table: np.ndarray, slowness: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    time = table * slowness[before[:, None], after[None]]
    time[before[:, None] == after[None]] = 0
    return float(time.max())


def excess(sizes: np.ndarray, device: Arrangement, room: int) -> int:
    """Experts beyond ``room``, summed over devices. ``sizes`` [L, G] experts by cluster."""
    kept = np.zeros(sizes.shape[1], int)
    np.add.at(kept, device, sizes)
    return int(np.maximum(kept - room, 0).sum())


def bound(flow: np.ndarray, slowness: np.ndarray) -> float:
    """No arrangement is better: each step alone, on the fastest link everywhere, with all the room it wants.

    A step is free to keep G flows on their devices if no two of them share a cluster. In decreasing order, the first
    flow that shares one with an earlier flow must cross, whatever is chosen. With equal links and room this is the
    optimum, since a step depends on how its two layers are named against each other and on nothing else.
    """
    links = slowness[~np.eye(len(slowness), dtype=bool)]
    return float(links.min()) * sum(_first_conflict(table) for table in flow) if links.size else 0.0


def _first_conflict(table: np.ndarray) -> float:
    rows, columns = set[int](), set[int]()
    for place in np.argsort(-table, axis=None, kind="stable"):
        row, column = divmod(int(place), table.shape[1])
        if row in rows or column in columns:
            return float(table[row, column])
        rows.add(row)
        columns.add(column)
    return 0.0


def search(
    flow: np.ndarray, slowness: np.ndarray, sizes: np.ndarray, room: int, *, starts: int = 6, seed: int = 0
) -> Arrangement:
    """The best arrangement found: room first, then the objective. From random starts two clusters of a layer change
    devices, or two devices change names from a layer on, as long as that helps."""
    rng = np.random.default_rng(seed)
    layers, devices = sizes.shape
    best, lowest = np.tile(np.arange(devices), (layers, 1)), (np.iinfo(int).max, np.inf)
    for _ in range(starts):
        device = np.stack([rng.permutation(devices) for _ in range(layers)])
        cost = _descend(flow, slowness, sizes, room, device)
        if cost < lowest:
            best, lowest = device, cost
    return best


def _descend(
    flow: np.ndarray, slowness: np.ndarray, sizes: np.ndarray, room: int, device: Arrangement
) -> tuple[int, float]:
    """Improve ``device`` in place; returns experts beyond room and the objective. Only steps at the ends of what
    changes are looked at again: renaming a whole tail leaves the steps inside it as they were, if links are equal."""
    layers, devices = device.shape
    steps = np.array([_step(flow[i], slowness, device[i], device[i + 1]) for i in range(layers - 1)])
    beyond, equal = excess(sizes, device, room), len(np.unique(slowness[~np.eye(devices, dtype=bool)])) <= 1
    moves = [
        (layer, last, a, b)
        for layer in range(layers)
        for last in sorted({layer + 1, layers})
        for a, b in _twos(devices)
    ]
    improved = True
    while improved:
        improved = False
        for layer, last, a, b in moves:
            tried = device.copy()
            part = tried[layer:last]
            tried[layer:last] = np.where(part == a, b, np.where(part == b, a, part))
            inside = range(layer - 1, last) if not equal else (layer - 1, last - 1)
            touched = sorted({i for i in inside if 0 <= i < layers - 1})
            fresh = np.array([_step(flow[i], slowness, tried[i], tried[i + 1]) for i in touched])
            gained = float(steps[touched].sum() - fresh.sum()) if touched else 0.0
            then = excess(sizes, tried, room)
            if then < beyond or (then == beyond and gained > 1e-9):
                device[:], beyond, improved = tried, then, True
                steps[touched] = fresh
    return beyond, float(steps.sum())


def _twos(devices: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(devices) for b in range(a + 1, devices)]
