"""Clustering: planted groups come back, objectives are those of brute force, nothing depends on chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.algebra import kmeans, mean_cosine, objective_curve, pooled_counts, spectral, token_grams
from moekit.algebra.cluster import _seeds
from moekit.errors import BudgetError, OptionError


def outputs(groups: list[int], tokens: int = 6, hidden: int = 5, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Outputs [E, T, H] of experts that follow the prototype of their group."""
    draw = np.random.default_rng(seed)
    prototypes = draw.normal(size=(max(groups) + 1, tokens, hidden))
    return prototypes[groups] + noise * draw.normal(size=(len(groups), tokens, hidden))


def objective(output_ETH: np.ndarray, label_E: np.ndarray) -> float:
    members = [output_ETH[label_E == label] for label in set(label_E.tolist())]
    return sum(float(((own - own.mean(0)) ** 2).sum()) for own in members)


def test_token_grams_and_mean_cosine_by_hand() -> None:
    output = outputs([0, 1, 0, 2])
    norms = np.linalg.norm(output, axis=-1)
    inner = np.einsum("ith,jth->tij", output, output)
    np.testing.assert_allclose(token_grams(output), inner)
    np.testing.assert_allclose(
        mean_cosine(token_grams(output)), (inner / norms.T[:, :, None] / norms.T[:, None]).mean(0)
    )


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_come_back(seed: int) -> None:
    planted = [0, 1, 0, 2, 1, 1, 2, 0]
    output = outputs(planted, seed=seed)
    found = kmeans(token_grams(output), 3, seed=seed)
    assert found.labels.tolist() == planted
    assert found.objective == pytest.approx(objective(output, found.labels))
    assert found.settled


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6), st.data())
def test_clusters_are_whole_and_counted_right(experts, tokens, seed, data) -> None:
    count = data.draw(st.integers(1, experts))
    output = np.random.default_rng(seed).normal(size=(experts, tokens, 3))
    found = kmeans(token_grams(output), count, seed=seed)
    assert set(found.labels.tolist()) == set(range(count))
    firsts = [found.labels.tolist().index(label) for label in range(count)]
    assert firsts == sorted(firsts)
    assert found.objective == pytest.approx(objective(output, found.labels), abs=1e-9)
    again = kmeans(token_grams(output), count, seed=seed)
    assert np.array_equal(again.labels, found.labels)
    if count == experts:
        assert found.objective == pytest.approx(0.0, abs=1e-9)


def test_close_to_the_best_grouping_there_is() -> None:
    ratios = []
    for seed in range(20):
        output = outputs([0, 0, 1, 1, 2, 2], noise=0.7, seed=seed)
        every = [np.array(labels) for labels in itertools.product(range(3), repeat=6) if len(set(labels)) == 3]
        best = min(objective(output, labels) for labels in every)
        found = kmeans(token_grams(output), 3, seed=seed).objective
        assert found >= best * (1 - 1e-9)
        ratios.append(found / best)
    assert np.mean(ratios) < 1.1


def test_seeds_are_drawn_by_distance_from_the_nearest() -> None:
    """Against the rule written out; identical experts are taken in order once nothing is far from what is chosen."""
    similar = mean_cosine(token_grams(outputs([0, 1, 2, 3, 0, 1, 2, 3], noise=0.3)))
    for seed in range(20):
        draw, found = np.random.default_rng(seed), _seeds(similar, 6, np.random.default_rng(seed))
        chosen = [int(draw.integers(8))]
        while len(chosen) < 6:
            far = np.clip(1 - similar[:, chosen].max(axis=1), 0, None)
            far[chosen] = 0
            chosen.append(int(draw.choice(8, p=far / far.sum())))
        assert found == chosen
    same = _seeds(np.ones((5, 5)), 5, np.random.default_rng(0))
    assert same[1:] == sorted(set(range(5)) - {same[0]})


def test_rounds_are_capped_and_said_so() -> None:
    capped = [kmeans(token_grams(outputs([0] * 12, noise=1.0, seed=s)), 5, iterations=1) for s in range(5)]
    assert not any(found.settled for found in capped)
    assert all(len(set(found.labels.tolist())) == 5 for found in capped)


def test_single_precision_groups_the_same() -> None:
    grams = token_grams(outputs([0, 1, 0, 2, 1, 1, 2, 0]))
    assert np.array_equal(kmeans(grams.astype(np.float32), 3).labels, kmeans(grams, 3).labels)
    same = np.repeat(outputs([0]), 5, axis=0).astype(np.float32)
    assert kmeans(token_grams(same), 3).labels.tolist() == [0, 1, 2, 2, 2]


def test_scale_matters_to_the_mean_but_not_to_the_similarity() -> None:
    output = outputs([0, 1, 0, 1], noise=0.0)
    output[2] *= 10
    assert kmeans(token_grams(output), 2).labels.tolist() == [0, 1, 0, 1]


def test_identical_experts_give_the_documented_grouping() -> None:
    output = np.repeat(outputs([0]), 5, axis=0)
    for seed in range(3):
        found = kmeans(token_grams(output), 3, seed=seed)
        assert found.labels.tolist() == [0, 1, 2, 2, 2]
        assert found.objective == pytest.approx(0.0, abs=1e-9)
        assert spectral(np.ones((5, 5)), 3, seed=seed).labels.tolist() == [0, 1, 2, 2, 2]
        assert spectral(np.zeros((5, 5)), 3, seed=seed).labels.tolist() == [0, 1, 2, 2, 2]


def test_silent_experts_are_no_trouble() -> None:
    output = outputs([0, 1, 0, 1, 0])
    output[4] = 0
    found = kmeans(token_grams(output), 2)
    assert found.labels[:4].tolist() == [0, 1, 0, 1]
    assert kmeans(np.zeros((4, 4)), 2).labels.max() == 1


def test_spectral_finds_components_and_blocks() -> None:
    planted = np.array([0, 1, 0, 2, 1, 1, 2, 0, 2])
    blocks = (planted[:, None] == planted).astype(float)
    assert spectral(blocks, 3).labels.tolist() == planted.tolist()
    for seed in range(5):
        noise = np.random.default_rng(seed).uniform(0, 0.3, size=(9, 9))
        found = spectral(0.6 * blocks + (noise + noise.T) / 2, 3, seed=seed)
        assert found.labels.tolist() == planted.tolist()


def test_spectral_follows_chains_where_kmeans_cannot() -> None:
    """Two rings of neighbours: no common prototype, yet connected. This is what the Laplacian is for."""
    ring = np.zeros((16, 16))
    for start in (0, 8):
        for i in range(8):
            a, b = start + i, start + (i + 1) % 8
            ring[a, b] = ring[b, a] = 1.0
    assert spectral(ring + 0.001, 2).labels.tolist() == [0] * 8 + [1] * 8


def test_spectral_keeps_a_lonely_expert_apart() -> None:
    affinity = np.ones((5, 5))
    affinity[3] = affinity[:, 3] = 0
    assert spectral(affinity, 2).labels.tolist() == [0, 0, 0, 1, 0]


def test_pooled_counts_equal_brute_force() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        curves = [np.sort(draw.uniform(size=5))[::-1] for _ in range(3)]
        found = pooled_counts(curves, 8)
        fits = [c for c in itertools.product(range(1, 6), repeat=3) if sum(c) <= 8]
        best = min(sum(curve[m - 1] for curve, m in zip(curves, c, strict=True)) for c in fits)
        assert sum(curve[m - 1] for curve, m in zip(curves, found, strict=True)) == pytest.approx(best)
        assert sum(found) <= 8


def test_layers_with_more_variety_get_more_clusters() -> None:
    varied, plain = outputs([0, 1, 2, 3, 4, 5], seed=1), outputs([0, 0, 0, 0, 1, 1], seed=2)
    curves = [objective_curve(token_grams(layer)) for layer in (varied, plain)]
    assert all((np.diff(curve) <= 0).all() for curve in curves)
    assert pooled_counts(curves, 8) == (6, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kmeans(np.eye(3), 4), OptionError, "4 clusters of 3 experts are not possible: use 1 to 3"),
        (lambda: kmeans(np.eye(3), 0), OptionError, "0 clusters of 3"),
        (lambda: kmeans(np.full((2, 2), np.nan), 1), OptionError, "NaN or infinite"),
        (lambda: spectral(np.eye(3), 4), OptionError, "4 clusters of 3 experts"),
        (lambda: spectral(-np.ones((3, 3)), 2), OptionError, "symmetric and at least 0"),
        (lambda: spectral(np.triu(np.ones((3, 3))), 2), OptionError, "symmetric and at least 0"),
        (lambda: spectral(np.full((2, 2), np.inf), 1), OptionError, "NaN or infinite"),
        (lambda: pooled_counts([np.ones(3)] * 4, 3), BudgetError, "3 clusters for 4 layers are too few"),
    ],
)
def test_bad_input_is_refused(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
