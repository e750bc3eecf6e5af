"""Grouping experts: similarities, joining each expert to the leader it is most like, k-means and spectral clustering.

Clusters are numbered by their lowest expert, so that equal groupings are equal labels.
Shapes by suffix: T tokens, E experts, H hidden size, M clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from moekit.algebra.allocate import allocate
from moekit.errors import BudgetError, OptionError

TIE = 1e-7
"""Cosines closer than this are equal: what float32 sums leave of equality."""


@dataclass(frozen=True)
class Clustering:
    """``labels`` [E] in 0 to M - 1; ``objective``: squared distances to centroids; ``settled``: it converged."""

    labels: np.ndarray
    objective: float
    settled: bool = True


def cosine_of_gram(gram_EE: np.ndarray, of: str = "experts") -> np.ndarray:
    """Cosine similarities [E, E] of vectors known only by their inner products; zero against a zero vector.

    An expert whose own product is infinite was never scored (masked: its router logits are -inf) and is like no other.
    Raises :class:`OptionError`, naming ``of``, where another product is NaN or infinite.
    """
    own_E = np.diag(gram_EE)
    scored_EE = np.logical_and.outer(own_E != np.inf, own_E != np.inf)
    if not np.isfinite(gram_EE[scored_EE]).all():
        raise OptionError(
            f"inner products of {of} hold NaN or infinite values: they cannot be compared; check the model's weights"
        )
    norm_E = np.sqrt(np.clip(own_E, 0.0, None))
    scale_EE = np.where(scored_EE, np.outer(norm_E, norm_E), 0.0)
    return np.divide(gram_EE, scale_EE, out=np.zeros_like(gram_EE, dtype=float), where=scale_EE > 0)


def assign_to_leaders(similarity_EE: np.ndarray, leaders: Sequence[int]) -> np.ndarray:
    """For every expert the leader [E] it is most similar to; a leader is its own. Ties go to the earliest leader."""
    ids = np.asarray(sorted(leaders))
    chosen_E = ids[np.argmax(similarity_EE[:, ids], axis=1)]
    chosen_E[ids] = ids
    return chosen_E


def token_grams(output_ETH: np.ndarray) -> np.ndarray:
    """Inner products [T, E, E] of the experts' outputs, token by token: all that clustering needs to know of them."""
    output_TEH = np.swapaxes(output_ETH, 0, 1)
    return output_TEH @ np.swapaxes(output_TEH, 1, 2)


def mean_cosine(gram_TEE: np.ndarray) -> np.ndarray:
    """Similarity [E, E] of experts: the cosine of their outputs, averaged over tokens (Sub-MoE, 2025)."""
    return np.mean([cosine_of_gram(gram_EE) for gram_EE in gram_TEE], axis=0)


def kmeans(gram_TEE: np.ndarray, count: int, *, seed: int = 0, restarts: int = 4, iterations: int = 50) -> Clustering:
    """Group experts by their outputs on the same tokens into exactly ``count`` clusters, none of them empty.

    The outputs enter as inner products [T, E, E] (:func:`token_grams`; [E, E] is one token): every centroid is a mean
    of outputs, so its cosines and distances follow from these. Sub-MoE's rules: k-means++ start with
    1 - similarity as squared distance; an expert joins the centroid of highest mean cosine over tokens, ties to the
    lower cluster; the centroid is the plain mean. The two rules do not share an objective, so rounds are capped, and
    the grouping of least objective ever seen over ``restarts`` starts is returned. A cluster left empty takes the
    expert least like its own centroid, lowest id first, from a cluster of several: of identical experts the lowest
    ids become singletons and the others stay together.

    Raises :class:`OptionError` for a count out of range or values that are not finite.
    """
    grams = np.asarray(gram_TEE)
    grams = grams[None] if grams.ndim == 2 else grams
    experts = grams.shape[-1]
    _check(count, experts, grams)
    total_EE, alike_EE = grams.sum(axis=0, dtype=float), mean_cosine(grams)
    found = []
    for restart in range(restarts):
        means_ME = np.eye(experts)[_seeds(alike_EE, count, np.random.default_rng([seed, restart]))]
        found.append(_descend(grams, total_EE, means_ME, iterations))
    best = min(found, key=lambda one: one.objective)
    return Clustering(_by_lowest(best.labels), best.objective, best.settled)


def _descend(grams: np.ndarray, total_EE: np.ndarray, means_ME: np.ndarray, iterations: int) -> Clustering:
    """One run from these centroids: the best grouping on the way, and whether the last round changed nothing."""
    count, best, label_E = len(means_ME), None, np.empty(0)
    for _ in range(iterations):
        moved_E = _fill(_similarity(grams, means_ME), count)
        if np.array_equal(moved_E, label_E):
            break
        label_E, means_ME = moved_E, _means(moved_E, count)
        objective = _objective(total_EE, label_E, means_ME)
        if best is None or objective < best.objective:
            best = Clustering(label_E, objective)
    else:
        assert best is not None
        return Clustering(best.labels, best.objective, False)
    assert best is not None
    return best


def spectral(affinity_EE: np.ndarray, count: int, *, seed: int = 0) -> Clustering:
    """Spectral clustering of experts by affinities of at least 0 [E, E] into exactly ``count`` clusters.

    Ng, Jordan and Weiss, 2002: the eigenvectors of the ``count`` smallest eigenvalues of
    I - D^-1/2 A D^-1/2, rows scaled to length 1, then :func:`kmeans`. The diagonal is ignored. Where all affinities
    are alike they hold no information, and the grouping is that of :func:`kmeans` for identical experts. Raises
    :class:`OptionError` for a count out of range and affinities that are negative, not finite or not symmetric.
    """
    affinity = np.array(affinity_EE, dtype=float)
    experts = len(affinity)
    _check(count, experts, affinity)
    if not np.allclose(affinity, affinity.T) or affinity.min() < 0:
        raise OptionError("affinities must be symmetric and at least 0 (map a cosine c to (c + 1) / 2)")
    np.fill_diagonal(affinity, 0.0)
    others = affinity[~np.eye(experts, dtype=bool)]
    if others.size == 0 or np.ptp(others) <= 1e-12 * max(1.0, others.max()):
        return kmeans(np.ones((experts, experts)), count, seed=seed)
    degree_E = affinity.sum(1)
    root_E = np.divide(1.0, np.sqrt(degree_E), out=np.zeros(experts), where=degree_E > 0)
    # An expert without affinities is a component of its own: eigenvalue 0.
    laplacian = np.diag((degree_E > 0).astype(float)) - root_E[:, None] * affinity * root_E
    _, vectors = eigh((laplacian + laplacian.T) / 2, subset_by_index=(0, count - 1))
    return kmeans(cosine_of_gram(vectors @ vectors.T), count, seed=seed)


def objective_curve(gram_TEE: np.ndarray, *, seed: int = 0, restarts: int = 4, iterations: int = 50) -> np.ndarray:
    """The objective of :func:`kmeans` for 1, 2, ... E clusters [E], never rising (a worse start is no reason to)."""
    counts = range(1, np.asarray(gram_TEE).shape[-1] + 1)
    found = [kmeans(gram_TEE, m, seed=seed, restarts=restarts, iterations=iterations).objective for m in counts]
    return np.minimum.accumulate(found)


def pooled_counts(curves: Sequence[np.ndarray], total: int) -> tuple[int, ...]:
    """How many clusters each layer of a pool gets: the least sum of objectives, at least one each, ``total`` together.

    ``curves[l][m - 1]`` is the objective of layer l at m clusters (Sub-MoE pools the experts of neighbouring layers;
    here no cluster may span two). Where curves are convex this is to hand out clusters by the largest marginal drop;
    it is exact where they are not. Ties use fewer clusters. Raises :class:`BudgetError` below one cluster per layer.
    """
    menus = [[(count, float(loss)) for count, loss in enumerate(curve, 1)] for curve in curves]
    found = allocate(menus, total)
    if found is None:
        raise BudgetError(f"{total} clusters for {len(curves)} layers are too few: each layer needs at least one")
    return tuple(choice + 1 for choice in found.choice)


def _seeds(similarity_EE: np.ndarray, count: int, draw: np.random.Generator) -> list[int]:
    """k-means++: each next expert with a chance in proportion to its distance from the nearest one chosen."""
    experts = len(similarity_EE)
    chosen = [int(draw.integers(experts))]
    nearest_E, free_E = similarity_EE[:, chosen[0]].copy(), np.ones(experts, dtype=bool)
    while len(chosen) < count:
        free_E[chosen[-1]] = False
        distance_E = np.where(free_E, np.clip(1.0 - nearest_E, 0.0, None), 0.0)
        total = distance_E.sum()
        chosen.append(int(draw.choice(experts, p=distance_E / total)) if total > 0 else int(np.argmax(free_E)))
        np.maximum(nearest_E, similarity_EE[:, chosen[-1]], out=nearest_E)
    return chosen


def _similarity(grams: np.ndarray, means_ME: np.ndarray) -> np.ndarray:
    """Mean cosine [E, M] over tokens of every expert's output with every mean of outputs (rows of ``means_ME``)."""
    means_ME = means_ME.astype(grams.dtype)
    total = np.zeros(means_ME.shape[::-1])
    for start in range(0, len(grams), 64):
        part = grams[start : start + 64]
        inner_TEM = part @ means_ME.T
        mean_TM = np.einsum("me,tem->tm", means_ME, inner_TEM)
        own_TE = np.diagonal(part, axis1=1, axis2=2)
        scale_TEM = np.sqrt(np.clip(own_TE[:, :, None] * mean_TM[:, None], 0.0, None))
        total += np.divide(inner_TEM, scale_TEM, out=np.zeros_like(inner_TEM), where=scale_TEM > 0).sum(0)
    # Equal up to rounding is equal: ties must not depend on the order of sums.
    return np.round(total / len(grams) / TIE) * TIE


def _fill(similarity_EM: np.ndarray, count: int) -> np.ndarray:
    """Each expert to its most similar cluster, then one to every cluster that is empty."""
    label_E = similarity_EM.argmax(axis=1)
    for cluster in range(count):
        sizes = np.bincount(label_E, minlength=count)
        if sizes[cluster] == 0:
            own_E = similarity_EM[np.arange(len(label_E)), label_E]
            label_E[int(np.argmin(np.where(sizes[label_E] > 1, own_E, np.inf)))] = cluster
    return label_E


def _means(label_E: np.ndarray, count: int) -> np.ndarray:
    members_ME = (label_E == np.arange(count)[:, None]).astype(float)
    return members_ME / members_ME.sum(1, keepdims=True)


def _objective(total_EE: np.ndarray, label_E: np.ndarray, means_ME: np.ndarray) -> float:
    """``sum_c sum_(j in c) ||Y_j - C_c||^2`` = ``sum_j |Y_j|^2 - sum_c n_c |C_c|^2``."""
    centroid_M = ((means_ME @ total_EE) * means_ME).sum(axis=1)
    return max(0.0, float(np.trace(total_EE) - np.bincount(label_E) @ centroid_M))


def _by_lowest(label_E: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(label_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _check(count: int, experts: int, values: np.ndarray) -> None:
    if not 1 <= count <= experts:
        raise OptionError(f"{count} clusters of {experts} experts are not possible: use 1 to {experts}")
    if not np.isfinite(values).all():
        raise OptionError("similarities of experts hold NaN or infinite values: they cannot be grouped")
