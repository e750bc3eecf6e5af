"""Grouping one layer's experts into clusters of equal load, of any size: min sum_c |T_c - mean|, T_c a cluster's load.

A mixed-integer programme for HiGHS: x[c, e] in {0, 1}, sum_c x = 1, sum_e x >= 1, d_c >= +-(T_c - mean). Deviations
are held against the whole load (a constant in the objective), so that the relative gap means something where the
optimum is near zero. HiGHS may look at so many branches and no more, which unlike a time limit gives the same answer on
a busy machine; what it does not improve by then stands as heaviest-first and exchanges left it.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def deviation(loads: np.ndarray, cluster: np.ndarray, clusters: int) -> float:
    """sum_c |T_c - mean|."""
    sums = np.bincount(cluster, loads, clusters)
    return float(np.abs(sums - loads.sum() / clusters).sum())


def heaviest_first(loads: np.ndarray, clusters: int) -> np.ndarray:
    """[E] clusters: experts in decreasing load, each to the lightest; the last ones fill clusters that are empty."""
    cluster, load, size = np.zeros(len(loads), int), np.zeros(clusters), np.zeros(clusters, int)
    for done, expert in enumerate(np.argsort(-loads, kind="stable")):
        empty = np.flatnonzero(size == 0)
        must = len(loads) - done <= len(empty)
        best = int(empty[0]) if must else int(np.lexsort((size, load))[0])
        cluster[expert] = best
        load[best] += loads[expert]
        size[best] += 1
    return cluster


def exchanged(loads: np.ndarray, cluster: np.ndarray, clusters: int) -> np.ndarray:
    """[E] clusters after moving one expert or exchanging two, always what lowers the sum of squared loads most."""
    cluster, experts = cluster.copy(), np.arange(len(loads))
    padded = np.append(loads, 0.0)  # the last "expert" is nothing: exchanging with it is a move
    while True:
        sums, size = np.bincount(cluster, loads, clusters), np.bincount(cluster, minlength=clusters)
        best, chosen = -1e-9 * loads.sum() ** 2, None
        for a in experts:
            for b, to in [(b, cluster[b]) for b in experts[a + 1 :]] + [(len(loads), c) for c in range(clusters)]:
                given = padded[a] - padded[b]
                if to == cluster[a] or (b == len(loads) and size[cluster[a]] == 1):
                    continue
                change = 2 * given * (given - sums[cluster[a]] + sums[to])
                if change < best:
                    best, chosen = change, (a, b, to)
        if chosen is None:
            return cluster
        a, b, to = chosen
        if b < len(loads):
            cluster[b] = cluster[a]
        cluster[a] = to


def solve(loads: np.ndarray, clusters: int, *, branches: int = 100, gap: float = 1e-3) -> tuple[np.ndarray, float]:
    """([E] clusters, a proven lower bound of the deviation); ``gap`` is a share of the whole load."""
    first = exchanged(loads, heaviest_first(loads, clusters), clusters)
    total, experts = float(loads.sum()), len(loads)
    least = max(0.0, 2 * (float(loads.max()) - total / clusters))  # what is above the mean is missing elsewhere
    if deviation(loads, first, clusters) <= max(least, gap * total) or clusters == 1:
        return first, least
    size = clusters * experts
    x = np.arange(size).reshape(clusters, experts)
    once, filled = np.zeros((experts, size + clusters + 1)), np.zeros((clusters, size + clusters + 1))
    above, below = filled.copy(), filled.copy()
    for expert in range(experts):
        once[expert, x[:, expert]] = 1
    for c in range(clusters):
        filled[c, x[c]] = 1
        above[c, x[c]], above[c, size + c] = loads, -1
        below[c, x[c]], below[c, size + c] = loads, 1
    upper = np.concatenate([np.ones(size), np.full(clusters, np.inf), [1]])
    lower = np.concatenate([np.zeros(size + clusters), [1]])
    for expert in range(min(experts, clusters)):  # names of clusters are interchangeable
        upper[x[expert + 1 :, expert]] = 0
    mean = total / clusters
    found = milp(
        np.concatenate([np.zeros(size), np.ones(clusters), [total]]),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(filled, 1, np.inf),
            LinearConstraint(above, -np.inf, mean),
            LinearConstraint(below, mean, np.inf),
        ],
        bounds=Bounds(lower, upper),
        integrality=np.concatenate([np.ones(size), np.zeros(clusters + 1)]),
        options={"node_limit": branches, "mip_rel_gap": gap},
    )
    if found.mip_dual_bound is not None:
        least = max(least, float(found.mip_dual_bound) - total)
    if found.x is None:
        return first, least
    cluster = found.x[:size].reshape(clusters, experts).argmax(0)
    better = deviation(loads, cluster, clusters) < deviation(loads, first, clusters)
    return (cluster if better else first), min(least, deviation(loads, cluster if better else first, clusters))
