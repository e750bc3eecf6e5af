"""Solvers of placement: all find the brute-force optimum where that can be had, and no bound is ever above it."""

import itertools

import numpy as np
import pytest

from moekit.errors import OptionError
from moekit.parallel import (
    _solver_balance,
    _solver_bound,
    _solver_greedy,
    _solver_layers,
    _solver_links,
    _solver_local,
    _solver_milp,
    _solver_stage,
)
from moekit.parallel._solver import apart, every_layer, per_device

TINY = [(2, 4, 2), (3, 4, 2), (3, 4, 4), (2, 6, 3), (4, 2, 2), (2, 3, 1)]


def random_pairs(layers, experts, seed=0):
    return np.random.default_rng(seed).integers(0, 20, (layers - 1, experts, experts)).astype(float)


def planted(layers, experts, devices, stay=0.6, tokens=2000, seed=0):
    """Tokens that follow a hidden permutation with probability ``stay``, and go anywhere otherwise."""
    rng = np.random.default_rng(seed)
    pairs, now = np.zeros((layers - 1, experts, experts)), rng.integers(0, experts, tokens)
    for table in pairs:
        following = np.where(rng.random(tokens) < stay, rng.permutation(experts)[now], rng.integers(0, experts, tokens))
        np.add.at(table, (now, following), 1)
        now = following
    return pairs


def brute(pairs, devices):
    layers = itertools.product(list(every_layer(pairs.shape[1], devices)), repeat=len(pairs) + 1)
    return min(apart(pairs, np.array(placed)) for placed in layers)


@pytest.mark.parametrize("size", TINY)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_solver_finds_the_brute_force_optimum(size, seed):
    layers, experts, devices = size
    pairs = random_pairs(layers, experts, seed)
    best = brute(pairs, devices)
    for solved in (_solver_layers.solve(pairs, devices), _solver_milp.solve(pairs, devices)):
        assert solved.cost == pytest.approx(best)
        assert solved.bound == pytest.approx(best)
        assert solved.cost == pytest.approx(apart(pairs, solved.device))
        assert solved.exact
        assert (np.sort(solved.device, 1) == np.repeat(np.arange(devices), experts // devices)).all()
    assert apart(pairs, _solver_local.search(pairs, devices)) == pytest.approx(best)
    assert _solver_bound.bound(pairs, devices, iterations=200) <= best + 1e-6


def test_the_exact_solvers_agree_and_the_bound_is_close_on_planted_affinity():
    pairs = planted(4, 8, 2)
    exact, programme = _solver_layers.solve(pairs, 2), _solver_milp.solve(pairs, 2)
    assert exact.cost == programme.cost
    assert apart(pairs, _solver_local.search(pairs, 2)) == exact.cost
    below = _solver_bound.bound(pairs, 2)
    assert 0.98 * exact.cost < below <= exact.cost
    # Hidden groups keep 0.6 of the pairs together and chance half of the rest.
    assert exact.cost / pairs.sum() == pytest.approx(0.2, abs=0.02)


def test_the_bound_holds_for_uniform_counts_and_for_chains_cut_in_pieces(monkeypatch):
    """With all pairs equal exactly 1 - 1 / P are apart, whatever is done: the bound must reach it and stay below."""
    uniform = np.full((3, 8, 8), 5.0)
    assert _solver_bound.bound(uniform, 4) == pytest.approx(0.75 * uniform.sum(), rel=1e-6)
    pairs = planted(6, 8, 4)
    best = _solver_layers.solve(pairs, 4).cost
    whole = _solver_bound.bound(pairs, 4)
    monkeypatch.setattr(_solver_bound, "WIDEST", 24)
    cut = _solver_bound.bound(pairs, 4)
    monkeypatch.setattr(_solver_bound, "WIDEST", 8)
    by_degree = _solver_bound.bound(pairs, 4)
    assert by_degree <= cut + 1e-6 <= whole + 2e-6
    assert whole <= best
    assert by_degree > 0


def test_programmes_without_time_or_with_a_gap():
    pairs = planted(6, 8, 4, stay=0.2)
    assert _solver_milp.solve(pairs, 4, seconds=1e-3) is None
    early = _solver_milp.solve(planted(4, 8, 2), 2, gap=0.5)
    assert early.bound <= early.cost
    assert early.bound < _solver_layers.solve(planted(4, 8, 2), 2).cost * (1 + 1e-9)


def test_solving_picks_what_is_affordable(monkeypatch):
    pairs = planted(4, 8, 2)
    assert _solver_stage.solve(pairs, 2).exact
    exact = _solver_layers.solve(pairs, 2).cost
    monkeypatch.setattr(_solver_layers, "LIMIT", 0.0)
    searched = _solver_stage.solve(pairs, 2)
    assert searched.bound < exact <= searched.cost
    assert _solver_stage.bound(pairs, 2) == searched.bound


def test_stages_put_nodes_first():
    pairs = planted(4, 8, 4)
    device, first = _solver_stage.staged(pairs, [2, 2], _solver_stage.solve)
    assert np.array_equal(device // 2, first.device)
    assert first.cost == _solver_layers.solve(pairs, 2).cost
    assert (np.sort(device, 1) == np.repeat(np.arange(4), 2)).all()
    flat = _solver_layers.solve(pairs, 4)
    assert apart(pairs, device) >= flat.cost
    assert apart(pairs, flat.device // 2) >= first.cost


def test_one_layer_alone():
    nothing = np.zeros((0, 4, 4))
    assert _solver_layers.solve(nothing, 2).cost == 0
    assert _solver_local.search(nothing, 2).shape == (1, 4)
    assert _solver_bound.bound(nothing, 2) == 0
    device, _ = _solver_stage.staged(nothing, [2, 2], _solver_stage.solve)
    assert sorted(device[0]) == [0, 1, 2, 3]


def test_greedy_balance_and_its_bound():
    counts = np.array([[8.0, 1, 1, 2], [3, 3, 3, 3]])
    device = _solver_greedy.balanced(counts, 2)
    assert device[0].tolist() == [0, 1, 0, 1]  # 8 and 1 against 2 and 1: two on each device
    # Layer 0: the heaviest with the lightest, 9 over a mean of 6; layer 1 is even.
    assert _solver_greedy.least_imbalance(counts, 2) == pytest.approx((9 / 6 + 1) / 2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        loads = rng.dirichlet(np.full(6, 0.5), 1) * 100
        best = min(np.bincount(p, loads[0], 2).max() for p in every_layer(6, 2)) / 50
        assert _solver_greedy.least_imbalance(loads, 2) <= best + 1e-9


@pytest.mark.parametrize("clusters", [2, 3])
def test_clusters_of_equal_load_match_brute_force(clusters):
    rng = np.random.default_rng(clusters)
    for _ in range(4):
        loads = rng.integers(1, 60, 7).astype(float)
        ways = (np.array(way) for way in itertools.product(range(clusters), repeat=7) if len(set(way)) == clusters)
        best = min(_solver_balance.deviation(loads, way, clusters) for way in ways)
        found, least = _solver_balance.solve(loads, clusters, gap=0.0, branches=10_000)
        assert _solver_balance.deviation(loads, found, clusters) == pytest.approx(best, abs=1e-5)
        assert least <= best + 1e-6
        first = _solver_balance.heaviest_first(loads, clusters)
        moved = _solver_balance.exchanged(loads, first, clusters)
        assert set(first) == set(moved) == set(range(clusters))
        squares = [(np.bincount(c, loads, clusters) ** 2).sum() for c in (first, moved)]
        assert squares[1] <= squares[0]


def test_exchanges_find_what_one_move_or_swap_gains():
    loads = np.array([5.0, 4, 3, 2])
    assert _solver_balance.deviation(loads, np.array([0, 0, 1, 1]), 2) == 4
    moved = _solver_balance.exchanged(loads, np.array([0, 0, 1, 1]), 2)
    assert _solver_balance.deviation(loads, moved, 2) == 0
    kept = _solver_balance.exchanged(np.array([9.0, 1, 1]), np.array([0, 1, 1]), 2)
    assert kept.tolist() == [0, 1, 1]  # the only expert of a cluster does not leave it


def test_heaviest_first_leaves_no_cluster_empty():
    assert sorted(_solver_balance.heaviest_first(np.array([9.0, 0, 0, 0]), 4)) == [0, 1, 2, 3]
    found, least = _solver_balance.solve(np.array([9.0, 1, 1, 1]), 2)
    assert least == pytest.approx(2 * (9 - 6))
    assert _solver_balance.deviation(np.array([9.0, 1, 1, 1]), found, 2) == pytest.approx(6)


def test_links_match_brute_force():
    rng = np.random.default_rng(5)
    names = list(itertools.permutations(range(3)))
    for slowness in (np.ones((3, 3)), np.array([[1, 1, 4], [1, 1, 4], [4, 4, 1]], float)):
        flow = rng.integers(0, 50, (2, 3, 3)).astype(float)
        sizes = rng.integers(1, 4, (3, 3))
        room = -(-sizes.sum() // 3)
        every = [np.array(way) for way in itertools.product(names, repeat=3)]
        best = min((_solver_links.excess(sizes, w, room), _solver_links.busiest(flow, slowness, w)) for w in every)
        found = _solver_links.search(flow, slowness, sizes, room)
        assert _solver_links.excess(sizes, found, room) == best[0]
        assert _solver_links.busiest(flow, slowness, found) == pytest.approx(best[1])
        free = min(_solver_links.busiest(flow, slowness, w) for w in every)
        assert _solver_links.bound(flow, slowness) <= free + 1e-9
        if (slowness == 1).all():
            assert _solver_links.bound(flow, slowness) == pytest.approx(free)


def test_devices_must_divide():
    with pytest.raises(OptionError, match="6 experts per layer do not divide over 4 devices"):
        per_device(6, 4)
