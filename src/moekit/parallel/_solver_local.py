"""Local search for affinity: one layer after the other is placed optimally given its neighbours, from many starts.

Given the layers before and after, what a layer's expert gains on each device is a linear assignment problem with room
for E / P experts per device, which scipy solves exactly; repeated until no layer alone can improve. A start deals one
layer at random and lets the others follow it, one by one, in both directions. From where a descent ends, experts of
one layer are exchanged, the layers to one side follow again, and what is better is kept (iterated local search).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from moekit.parallel._solver import apart, per_device


def search(pairs: np.ndarray, devices: int, *, starts: int = 8, kicks: int = 30, seed: int = 0) -> np.ndarray:
    """[L, E] the best placement found; deterministic by ``seed``."""
    layers, experts = len(pairs) + 1, pairs.shape[1]
    rng = np.random.default_rng(seed)
    even = np.arange(experts) // per_device(experts, devices)
    best, lowest = np.tile(even, (layers, 1)), np.inf
    for _ in range(starts):
        device = np.zeros((layers, experts), int)
        first = int(rng.integers(layers))
        device[first] = rng.permutation(even)
        _follow(pairs, device, devices, range(first + 1, layers), -1)
        _follow(pairs, device, devices, range(first - 1, -1, -1), 1)
        cost = descend(pairs, device, devices)
        for _ in range(kicks):
            tried = _kicked(pairs, device, devices, rng)
            found = descend(pairs, tried, devices)
            if found < cost:
                device, cost = tried, found
        if cost < lowest:
            best, lowest = device, cost
    return best


def _kicked(pairs: np.ndarray, device: np.ndarray, devices: int, rng: np.random.Generator) -> np.ndarray:
    """Some experts of one layer exchanged, and the layers on one side of it placed anew to follow."""
    tried = device.copy()
    layer = int(rng.integers(len(device)))
    some = rng.choice(device.shape[1], size=min(int(rng.integers(2, 7)), device.shape[1]), replace=False)
    tried[layer, some] = rng.permutation(tried[layer, some])
    if rng.random() < 0.5:
        _follow(pairs, tried, devices, range(layer + 1, len(device)), -1)
    else:
        _follow(pairs, tried, devices, range(layer - 1, -1, -1), 1)
    return tried


def _follow(pairs: np.ndarray, device: np.ndarray, devices: int, layers: range, toward: int) -> None:
    """Place layers one by one by the neighbour on one side alone (-1: the layer before), in place."""
    for layer in layers:
        known = np.eye(devices)[device[layer + toward]]
        device[layer] = _best(pairs[layer - 1].T @ known if toward < 0 else pairs[layer] @ known)


def descend(pairs: np.ndarray, device: np.ndarray, devices: int) -> float:
    """Improve ``device`` [L, E] in place until no layer alone can; returns the pairs left apart."""
    one_hot, rows = np.eye(devices), np.arange(device.shape[1])
    pending = list(range(len(device)))
    while pending:
        layer = pending.pop(0)
        gain = np.zeros((device.shape[1], devices))
        if layer > 0:
            gain += pairs[layer - 1].T @ one_hot[device[layer - 1]]
        if layer < len(pairs):
            gain += pairs[layer] @ one_hot[device[layer + 1]]
        new = _best(gain)
        if gain[rows, new].sum() > gain[rows, device[layer]].sum() * (1 + 1e-12) + 1e-9:
            device[layer] = new
            pending += [i for i in (layer - 1, layer + 1) if 0 <= i < len(device) and i not in pending]
    return apart(pairs, device)


def _best(gain: np.ndarray) -> np.ndarray:
    """[E] the even placement of one layer of greatest gain [E, P]."""
    each = per_device(*gain.shape)
    return np.asarray(linear_sum_assignment(-np.repeat(gain, each, axis=1))[1] // each)
