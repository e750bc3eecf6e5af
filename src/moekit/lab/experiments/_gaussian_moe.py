"""Gaussian mixtures of experts on the line, top-K gated: drawing from them, fitting them, and how far a fit is off.

``p(y | x) = sum_i softmax_i(top-K(b_i x + d_i)) N(y; a_i x + c_i, s_i^2)``; x is uniform on [-1, 1]. Parameters of k
experts are [k, 5]: b, d, a, c, s. Shapes by suffix: N observations, k experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segments(NamedTuple):
    """A top-1 fit: the edges between experts, and a, c, s of each [k, 3], from left to right."""

    edges: np.ndarray
    experts: np.ndarray


def draw(theta: np.ndarray, k_top: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), sorted by x."""
    x = np.sort(rng.uniform(-1, 1, count))
    gate = log_gates(torch.tensor(theta), torch.tensor(x), k_top).exp().numpy()
    which = (rng.uniform(size=(count, 1)) > gate.cumsum(1)).sum(1).clip(max=len(theta) - 1)
    own = theta[which]
    return x, own[:, 2] * x + own[:, 3] + own[:, 4] * rng.standard_normal(count)


def log_gates(theta: Tensor, x_N: Tensor, k_top: int) -> Tensor:
    """[N, k]; -inf for those outside the top K (masked before the softmax)."""
    logits = x_N[:, None] * theta[:, 0] + theta[:, 1]
    if k_top < len(theta):
        least = logits.detach().topk(k_top, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(1)


def log_density(theta: Tensor, x_N: Tensor, y_N: Tensor, k_top: int) -> Tensor:
    """[N]."""
    z = (y_N[:, None] - x_N[:, None] * theta[:, 2] - theta[:, 3]) / theta[:, 4]
    normal = -0.5 * z.square() - theta[:, 4].log() - 0.5 * np.log(2 * np.pi)
    return (log_gates(theta, x_N, k_top) + normal).logsumexp(1)


def maximise(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, k_top: int, iterations: int = 40
) -> tuple[np.ndarray, float]:
    """(parameters, mean log likelihood): a local maximum near ``theta``, by L-BFGS on all but K."""
    start = torch.tensor(theta)
    free = torch.cat((start[:, :4], start[:, 4:].log()), 1).requires_grad_()
    x_N, y_N = torch.tensor(x), torch.tensor(y)
    optimizer = torch.optim.LBFGS([free], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def value() -> Tensor:
        return -log_density(torch.cat((free[:, :4], free[:, 4:].exp()), 1), x_N, y_N, k_top).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        best = torch.cat((free[:, :4], free[:, 4:].exp()), 1).numpy().copy()
        return best, -float(value())


def segmented(x: np.ndarray, y: np.ndarray, k: int, places: int = 120, least: int = 8) -> Segments:
    """The most likely top-1 fit of at most k experts: lines between edges, found over ``places`` quantiles of x.

    Top-1 gates in one dimension cut the line into at most k intervals, one expert each, so this is all they can do. The
    edges are then moved to the best observation nearby.
    """
    count = len(x)
    sums = np.concatenate((np.zeros((1, 5)), np.cumsum(np.stack((x, y, x * x, x * y, y * y), 1), 0)))
    marks = np.unique(np.linspace(0, count, places + 1).round().astype(int))
    best = _best(sums, [marks] * (k - 1), count, least)
    for width in (count // places, max(count // places // 8, 1)):
        near = [np.unique(np.clip(np.linspace(e - width, e + width, 17).round().astype(int), 0, count)) for e in best]
        best = _best(sums, near, count, least)
    bounds = [0, *best, count]
    lines = [line(sums, np.array([a]), np.array([b]))[0] for a, b in itertools.pairwise(bounds) if b - a >= least]
    kept = [edge for edge in best if least <= edge <= count - least]
    return Segments(np.array([x[min(edge, count - 1)] for edge in kept]), np.array(lines))


def _best(sums: np.ndarray, places: Sequence[np.ndarray], count: int, least: int) -> list[int]:
    """The edges of highest likelihood among the given places; an interval may be empty."""
    grids = [g.ravel() for g in np.meshgrid(*places, indexing="ij")]
    ok = np.all([a <= b for a, b in itertools.pairwise([np.zeros_like(grids[0]), *grids])], axis=0)
    grids = [g[ok] for g in grids]
    bounds = [np.zeros_like(grids[0]), *grids, np.full_like(grids[0], count)]
    total = np.zeros(len(grids[0]))
    for a, b in itertools.pairwise(bounds):
        size = b - a
        start = np.minimum(a, count - 1)
        s = line(sums, start, np.maximum(b, start + 1))[:, 2]
        total += np.where(size == 0, 0.0, np.where(size < least, -np.inf, -size * np.log(s)))
    place = int(total.argmax())
    return [int(g[place]) for g in grids]


def line(sums: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """[.., 3]: slope, intercept and deviation (0.01 at least) of the line through observations first .. last."""
    n = (last - first).astype(float)
    sx, sy, sxx, sxy, syy = ((sums[last] - sums[first]).T) / n
    spread = np.maximum(sxx - sx**2, 1e-9)
    slope = (sxy - sx * sy) / spread
    rest = np.maximum(syy - sy**2 - slope**2 * spread, 1e-4)
    return np.stack((slope, sy - slope * sx, np.sqrt(rest)), -1)


def hellinger(p_XY: np.ndarray, q_XY: np.ndarray, step: float) -> float:
    """Mean over x of the Hellinger distance of two conditional densities on a grid of y of this step."""
    overlap = np.sqrt(p_XY * q_XY).sum(1) * step
    return float(np.sqrt(np.maximum(1 - overlap, 0)).mean())


def voronoi(fitted: np.ndarray, true: np.ndarray) -> tuple[float, list[int]]:
    """(mean over true experts of the mean |a|, |c|, |s| distance of the fitted in their cell, sizes of the cells)."""
    apart = np.abs(fitted[:, None] - true[None]).sum(2)
    cell = apart.argmin(1)
    sizes = [int((cell == j).sum()) for j in range(len(true))]
    loss = [apart[cell == j, j].mean() if sizes[j] else float(apart[:, j].min()) for j in range(len(true))]
    return float(np.mean(loss)), sizes
