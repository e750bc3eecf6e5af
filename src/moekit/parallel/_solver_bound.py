"""A proven lower bound of the affinity objective where no exact solver finishes: a semidefinite relaxation.

Let Y[a, b] be 1 where experts a and b (of all layers) share a device. Every placement has diag Y = 1, Y >= 0, and with
E / P experts of each layer on each device, Y - J / P is positive semidefinite and annihilates the indicator of each
layer: Y = J / P + V W V' with V an orthonormal basis of what is orthogonal to them. With S >= 0 off the diagonal and
any mu on it, weak duality gives for M = C + S - Diag(mu), whose C holds the pair counts,

    together <= sum(mu) + <M, J> / P + (n - n / P) lambda_max(V' M V),

since the trace of V W V' is n - n / P. The alternating direction method of multipliers (Wen, Goldfarb and Yin, 2010)
provides S and mu; each of its iterates gives a valid bound, however far it is from convergence.
Shapes by suffix: n = L * E.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

WIDEST = 256
"""Experts of all layers together beyond which the chain of layers is cut: bounds of its pieces add up."""


def bound(pairs: np.ndarray, devices: int, *, iterations: int = 300) -> float:
    """No placement has fewer pairs apart than this. Chains of layers too wide for one relaxation are cut into pieces
    that share a layer; a single pair of layers too wide is bounded by degrees alone."""
    tables, experts = len(pairs), pairs.shape[1]
    if devices == 1 or not pairs.sum():
        return 0.0
    if 2 * experts > WIDEST:
        return sum(_by_degree(table, devices) for table in pairs)
    step = min(max(WIDEST // experts - 1, 1), tables)
    pieces = -(-tables // step)
    edges = [round(tables * i / pieces) for i in range(pieces + 1)]
    return sum(_relaxed(pairs[a:b], devices, iterations) for a, b in pairwise(edges))


def _by_degree(table: np.ndarray, devices: int) -> float:
    """An expert is together with E / P of the next layer, at best the most frequent ones; the same looking back."""
    each = table.shape[1] // devices
    ahead = np.sort(table, axis=1)[:, -each:].sum()
    back = np.sort(table, axis=0)[-each:].sum()
    return float(table.sum() - min(ahead, back))


def _relaxed(pairs: np.ndarray, devices: int, iterations: int) -> float:
    """The bound for one chain of layers."""
    total = float(pairs.sum())
    if not total:
        return 0.0
    gain, basis = _matrix(pairs), _basis(len(pairs) + 1, pairs.shape[1])
    scale = gain.max()
    gain /= scale
    size, share = len(gain), 1 / devices
    split = np.where(np.eye(size, dtype=bool), 1.0, share)
    dual, step, best = np.zeros((size, size)), 1.0, np.inf
    for turn in range(iterations):
        inner = basis.T @ (split - dual + gain / step) @ basis
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
        spread = basis @ vectors * np.sqrt(np.maximum(values, 0))
        whole = spread @ spread.T + share
        shifted = whole + dual
        former, split = split, np.maximum(shifted, 0)
        np.fill_diagonal(split, 1)
        dual = shifted - split
        if turn % 10 == 9:
            best = min(best, _dual_value(gain, step * dual, basis, share))
            primal, moved = np.linalg.norm(whole - split), step * np.linalg.norm(split - former)
            factor = 1.5 if primal > 5 * moved else 1 / 1.5 if moved > 5 * primal else 1.0
            step, dual = step * factor, dual / factor
    return max(total - best * scale * (1 + 1e-9), 0.0)


def _dual_value(gain: np.ndarray, multiplier: np.ndarray, basis: np.ndarray, share: float) -> float:
    """The right side of the inequality of the module's text, in the scale of ``gain``."""
    size = len(gain)
    off = np.minimum(multiplier, 0)  # -S: off the diagonal it has no positive entry, whatever rounding did
    np.fill_diagonal(off, np.diag(multiplier))
    left = gain - off
    largest = np.linalg.eigvalsh(basis.T @ left @ basis)[-1]
    return float(np.trace(off) + left.sum() * share + (size - size * share) * largest)


def _matrix(pairs: np.ndarray) -> np.ndarray:
    """[n, n] symmetric, with <C, Y> the pairs together."""
    layers, experts = len(pairs) + 1, pairs.shape[1]
    gain = np.zeros((layers, experts, layers, experts))
    for layer, table in enumerate(pairs):
        gain[layer, :, layer + 1] = table / 2
        gain[layer + 1, :, layer] = table.T / 2
    return gain.reshape(layers * experts, layers * experts)


def _basis(layers: int, experts: int) -> np.ndarray:
    """[n, n - L] orthonormal, orthogonal to the indicator of every layer."""
    start = np.concatenate([np.ones((experts, 1)), np.eye(experts)[:, :-1]], axis=1)
    return np.kron(np.eye(layers), np.linalg.qr(start)[0][:, 1:])
