"""Affinity placement solved exactly, layer by layer, where one layer can be placed in few enough ways.

The objective couples consecutive layers only, so the best total is found by dynamic programming over all placements
of a layer (a longest path). Renaming the devices changes nothing, so only one name of each grouping is extended.
Shapes by suffix: S placements of a layer, C groupings (placements up to names), E experts, P devices.
"""

from __future__ import annotations

from math import factorial

import numpy as np

from moekit.parallel._solver import Solved, apart, every_layer, per_device

LIMIT = 1e11
"""Most operations that are worth it: some ten seconds of one core."""
_CHUNK = 256


def work(num_layers: int, num_experts: int, devices: int) -> float:
    """Operations that :func:`solve` would take."""
    each = per_device(num_experts, devices)
    ways = factorial(num_experts) // factorial(each) ** devices
    return 2.0 * ways * (ways // factorial(devices)) * num_experts * devices * max(num_layers - 1, 0)


def solve(pairs: np.ndarray, devices: int) -> Solved:
    """The optimum, which is its own bound. Call it only where :func:`work` is affordable."""
    experts = pairs.shape[1]
    state_SE = np.array(list(every_layer(experts, devices)))
    first: dict[tuple[int, ...], int] = {}
    group_S = np.array([first.setdefault(_renamed(tuple(state)), len(first)) for state in state_SE.tolist()])
    names_CE = np.array(list(first))
    hot_SF = np.eye(devices)[state_SE].reshape(len(state_SE), -1)
    value_C, parents = np.zeros(len(first)), list[np.ndarray]()
    for table in pairs:
        # Pairs kept together by x before and y after: sum over devices of x_p' table y_p.
        after_CF = np.einsum("ij,cjp->cip", table, np.eye(devices)[names_CE]).reshape(len(first), -1)
        best, source = np.zeros(len(first)), np.zeros(len(first), int)
        for start in range(0, len(first), _CHUNK):
            rows = slice(start, start + _CHUNK)
            total = after_CF[rows] @ hot_SF.T + value_C[group_S]
            source[rows] = total.argmax(1)
            best[rows] = total[np.arange(len(total)), source[rows]]
        value_C = best
        parents.append(source)
    device = _walk_back(names_CE, state_SE, group_S, parents, int(value_C.argmax()))
    cost = apart(pairs, device)
    return Solved(device, cost, min(cost, float(pairs.sum() - value_C.max())))


def _walk_back(
    names_CE: np.ndarray, state_SE: np.ndarray, group_S: np.ndarray, parents: list[np.ndarray], last: int
) -> np.ndarray:
    """[L, E] the path that ends in grouping ``last``, all layers in the names of the last one."""
    path = [names_CE[last]]
    named = np.arange(names_CE.max() + 1)  # a device of the present grouping -> its name in the last layer
    for source in reversed(parents):
        chosen = int(source[last])
        path.append(named[state_SE[chosen]])
        last = int(group_S[chosen])
        renamed = np.zeros_like(named)
        renamed[names_CE[last]] = path[-1]
        named = renamed
    return np.stack(path[::-1])


def _renamed(layer: tuple[int, ...]) -> tuple[int, ...]:
    """The same grouping with its devices in order of appearance."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(device, len(names)) for device in layer)
