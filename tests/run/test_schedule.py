"""Schedules against exhaustive optima, and batches against theirs."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.run import _batches
from moekit.run.schedule import Costs, best_split, flow_shop, greedy_split, impact, johnson, ring, static_split, timed

times = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)


@given(times)
def test_johnson_is_the_optimum_over_all_orders(jobs):
    transfer, compute = zip(*jobs, strict=True)
    best = min(flow_shop(order, transfer, compute) for order in permutations(range(len(jobs))))
    assert flow_shop(johnson(transfer, compute), transfer, compute) == best


def test_popular_first_is_johnsons_order_when_transfers_are_equal():
    compute = [3.0, 9.0, 5.0, 7.0]
    assert johnson([2.0] * 4, compute) == [1, 3, 2, 0] == sorted(range(4), key=lambda e: -compute[e])
    assert flow_shop([0, 2, 3, 1], [6.0] * 4, compute) > flow_shop([1, 3, 2, 0], [6.0] * 4, compute)


@pytest.mark.parametrize(("load", "compute"), [(2.0, 5.0), (5.0, 2.0), (3.0, 3.0)])
def test_ring_takes_the_longer_of_both_per_layer_whatever_the_slots(load, compute):
    for slots in (2, 3, 5):
        long, longer = (ring([load] * n, [compute] * n, slots) for n in (40, 60))
        assert (longer - long) / 20 == pytest.approx(max(load, compute))
    assert ring([load] * 9, [compute] * 9, 1) == pytest.approx(compute + 8 * (load + compute))
    assert ring([load] * 4, [compute] * 4, 4) == 4 * compute


def test_more_slots_absorb_jitter_only():
    load = [1.0, 1.0, 1.0, 9.0, 1.0, 1.0] * 4
    compute = [2.4] * 24
    few, many = ring(load, compute, 2), ring(load, compute, 6)
    assert many < few
    assert many >= sum(compute)


layers = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=60)
@given(layers)
def test_greedy_is_never_below_the_exhaustive_optimum(experts):
    tokens, cached = zip(*experts, strict=True)
    costs = Costs()
    greedy, best = greedy_split(tokens, cached, costs), best_split(tokens, cached, costs)
    assert greedy.makespan >= best.makespan - 1e-9
    assert sorted(greedy.fast + greedy.slow) == list(range(len(tokens)))
    assert min(static_split(tokens, cached, costs, move).makespan for move in (True, False)) >= best.makespan - 1e-9


@settings(max_examples=40)
@given(layers)
def test_no_order_on_the_fast_side_beats_cached_first(experts):
    tokens, cached = zip(*experts[:5], strict=True)
    costs, fast = Costs(slow=2.0, fast=0.7, move=0.9), range(len(tokens))
    move = [0.0 if known else costs.move for known in cached]
    best = min(flow_shop(order, move, [costs.fast] * len(tokens)) for order in permutations(fast))
    assert timed(fast, (), tokens, cached, costs).makespan == pytest.approx(best)


def test_decode_split_by_hand():
    # two cached on the fast side: 1.0; the third uncached costs 0.79 + 1 on the slow side, or ends at 1.5 if moved
    found = greedy_split([1, 1, 1], [True, True, False], Costs())
    assert found.makespan == pytest.approx(1.5)
    assert found.slow == ()
    assert greedy_split([1, 1, 1], [True, True, False], Costs(move=5.0)).makespan == pytest.approx(1.79)


def test_impact_is_the_makespan_that_a_prefetch_saves():
    tokens, cached, costs = [4, 4, 1], [False, True, False], Costs(move=3.0, slow=1.0, cold=0.0)
    saved = greedy_split(tokens, cached, costs).makespan - greedy_split(tokens, [True, True, False], costs).makespan
    assert impact(0, tokens, cached, costs) == saved > 0
    assert impact(1, tokens, cached, costs) == 0


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 12))
def test_every_token_is_in_one_batch_and_batches_are_full(expert, size):
    batches = _batches.expert_batches(expert, size)
    assert sorted(token for batch in batches for token in batch) == list(range(len(expert)))
    assert all(len(batch) == size for batch in batches[:-1])


def test_grouping_needs_fewer_experts_than_first_come():
    expert = np.random.default_rng(0).integers(0, 6, 96).tolist()
    grouped = [len({expert[t] for t in batch}) for batch in _batches.expert_batches(expert, 16)]
    fifo = [len(set(expert[i : i + 16])) for i in range(0, 96, 16)]
    assert np.mean(grouped) < 0.6 * np.mean(fifo)
    longest = max(expert.count(e) for e in range(6))
    assert all(n >= -(-16 // longest) for n in grouped)


def test_planted_groups_are_found_and_random_ones_are_near_the_optimum():
    draw = np.random.default_rng(1)
    kinds = draw.random((2, 3, 8)) < 0.4
    labels = np.array([0, 1, 1, 0, 0, 1, 0, 1])
    assert _batches.balanced_split(kinds[labels]) in (([0, 3, 4, 6], [1, 2, 5, 7]), ([1, 2, 5, 7], [0, 3, 4, 6]))
    ratios = []
    for _ in range(20):
        path = draw.random((8, 3, 8)) < 0.25
        found, best = (
            sum(_batches.union_size(path, half) for half in split(path))
            for split in (_batches.balanced_split, _batches.best_split)
        )
        assert found >= best
        ratios.append(found / best)
    assert np.mean(ratios) < 1.05


def test_impossible_batches_are_refused():
    with pytest.raises(OptionError, match="batches of 0 tokens: expected 1 or more"):
        _batches.expert_batches([1], 0)
    with pytest.raises(OptionError, match="3 sequences cannot be split in equal halves"):
        _batches.balanced_split(np.ones((3, 1, 2), bool))
