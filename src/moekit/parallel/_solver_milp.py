"""Affinity placement as a mixed-integer linear programme, on aggregated pair counts, for HiGHS.

Variables: x[l, e, p] in {0, 1} places an expert; z[l, i, j] in [0, 1] says that i of layer l and j of the next are
together. Maximise sum n[l, i, j] z[l, i, j] subject to

    sum_p x[l, e, p] = 1,   sum_e x[l, e, p] = E / P,
    z[l, i, j] <= 1 - x[l, i, p] + x[l+1, j, p]  and  z[l, i, j] <= 1 + x[l, i, p] - x[l+1, j, p]   for all p,
    sum_j z[l, i, j] = E / P,   sum_i z[l, i, j] = E / P.

One cost variable per token and layer (Yao et al., 2024) has the same optimum: tokens with equal experts cost the same.
The last two lines hold for every placement and cut off the useless fraction x = 1 / P, at which all pairs would be
together. Names of devices are interchangeable: expert e of the first layer is on one of the devices 0 to e.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moekit.parallel._solver import Solved, apart, per_device

LARGEST = 2_000
"""Variables beyond which HiGHS proves little in a minute."""


def size(num_layers: int, num_experts: int, devices: int) -> int:
    """Variables of the programme."""
    return num_layers * num_experts * devices + (num_layers - 1) * num_experts**2


def solve(pairs: np.ndarray, devices: int, *, seconds: float = 60.0, gap: float = 0.0) -> Solved | None:
    """The best placement HiGHS finds, and its proven bound; None where it finds none in time."""
    layers, experts = len(pairs) + 1, pairs.shape[1]
    rows, low, high = _constraints(layers, experts, devices)
    placed = layers * experts * devices
    upper = np.ones(size(layers, experts, devices))
    for expert in range(min(experts, devices)):
        upper[expert * devices + expert + 1 : (expert + 1) * devices] = 0
    found = milp(
        np.concatenate([np.zeros(placed), -pairs.ravel()]),
        constraints=LinearConstraint(rows, low, high),
        bounds=Bounds(0, upper),
        integrality=np.concatenate([np.ones(placed), np.zeros(pairs.size)]),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    if found.x is None:
        return None
    device = found.x[:placed].reshape(layers, experts, devices).argmax(2)
    cost = apart(pairs, device)
    return Solved(device, cost, min(cost, max(float(pairs.sum() + found.mip_dual_bound), 0.0)))


def _constraints(layers: int, experts: int, devices: int) -> tuple[coo_array, np.ndarray, np.ndarray]:
    """Matrix and limits of the lines of the module's text, in their order."""
    each = per_device(experts, devices)
    x = np.arange(layers * experts * devices).reshape(layers, experts, devices)
    z = x.size + np.arange((layers - 1) * experts * experts).reshape(layers - 1, experts, experts)
    before = np.broadcast_to(x[:-1, :, None], (*z.shape, devices))
    after = np.broadcast_to(x[1:, None], (*z.shape, devices))
    both = np.broadcast_to(z[..., None], before.shape)
    blocks = [
        (x.reshape(-1, devices), [1] * devices, 1, 1),
        (x.transpose(0, 2, 1).reshape(-1, experts), [1] * experts, each, each),
        (np.stack([both, before, after], -1).reshape(-1, 3), [1, 1, -1], -np.inf, 1),
        (np.stack([both, before, after], -1).reshape(-1, 3), [1, -1, 1], -np.inf, 1),
        (z.reshape(-1, experts), [1] * experts, each, each),
        (z.transpose(0, 2, 1).reshape(-1, experts), [1] * experts, each, each),
    ]
    columns = np.concatenate([variables.ravel() for variables, *_ in blocks])
    values = np.concatenate([np.tile(np.array(factors, float), len(v)) for v, factors, *_ in blocks])
    width = np.concatenate([np.full(len(v), len(factors)) for v, factors, *_ in blocks])
    rows = np.repeat(np.arange(len(width)), width)
    low = np.concatenate([np.full(len(v), float(lowest)) for v, _, lowest, _ in blocks])
    high = np.concatenate([np.full(len(v), float(most)) for v, _, _, most in blocks])
    return coo_array((values, (rows, columns)), shape=(len(width), x.size + z.size)), low, high
