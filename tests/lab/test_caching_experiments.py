"""Experiments on caches: their parts on traces written down, and rules that fail when a figure they rest on does."""

import numpy as np
import pytest
import torch

from figures import changed
from moekit.lab.experiments import (
    _caching,
    _seeds,
    expertflow,
    fate,
    hobbit,
    hybrimoe,
    local_routing_consistency,
    se_moe,
)
from moekit.profile import RoutingTrace
from moekit.run.hobbit import HIGH, LOW, SKIP, Hobbit


def trace_of(seed=0, sequences=3, length=40, layers=3, experts=8, slots=2):
    draw = np.random.default_rng(seed)
    count = sequences * length
    score = draw.random((count, layers, experts)) + draw.random((layers, experts))
    expert = np.argsort(-score, axis=2)[:, :, :slots]
    sequence = np.repeat(np.arange(sequences), length)
    return RoutingTrace(
        expert=expert,
        weight=np.full(expert.shape, 1 / slots, np.float32),
        sequence=sequence,
        step=sequence.copy(),
        decode=np.zeros(count, bool),
        num_experts=(experts,) * layers,
        domain=sequence % 3,
        domains=("a", "b", "c"),
        token=draw.integers(0, 9, count),
        scores=(score / score.sum(2, keepdims=True)).astype(np.float16),
        inputs=draw.normal(size=(count, layers, 4)).astype(np.float16),
    )


def up(mean=1.0):
    return {"mean": mean, "low": mean / 2, "high": 2 * mean, "n": 3}


def test_decoded_makes_steps_of_single_tokens_after_the_prompt():
    trace = _caching.decoded(trace_of(length=6), prompt=4)
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 6, 6, 6, 7, 8]
    assert trace.decode.tolist() == [False, False, False, False, True, True] * 3


def test_the_control_has_no_structure_and_the_same_shape():
    trace = trace_of(sequences=60)
    control = _caching.uniform(trace, 1)
    assert control.expert.shape == trace.expert.shape
    share = np.bincount(control.expert[:, 0].ravel(), minlength=8) / control.expert[:, 0].size
    assert np.abs(share - 1 / 8).max() < 0.02
    assert (np.diff(np.sort(control.expert, 2), axis=2) > 0).all()


def test_one_layer_is_that_layer():
    trace = trace_of()
    alone = _caching.one_layer(trace, 1)
    assert alone.num_layers == 1
    assert np.array_equal(alone.expert[:, 0], trace.expert[:, 1])


def test_every_policy_is_tried_and_none_beats_belady():
    found = _caching.tried(_caching.decoded(trace_of(), prompt=8), 0.5)
    assert set(found) == {*_caching.BASELINES, "belady"}
    assert all(one.hit_rate <= found["belady"].hit_rate for one in found.values())


def test_figures_over_seeds_are_intervals_at_every_leaf():
    found = _seeds.over_seeds([{"a": {"b": 1.0}, "c": 2.0}, {"a": {"b": 3.0}, "c": 2.0}])
    assert (found["a"]["b"]["mean"], found["a"]["b"]["n"], found["c"]["high"]) == (2.0, 2, 2.0)
    assert _caching.gap([3.0, 4.0], [1.0, 2.0])["low"] == 2.0


GOOD = {
    hybrimoe: {"rule": {"hits": up(), "control": {"mean": 0, "low": -1, "high": 1}, "decode": up(), "prompts": up()}},
    se_moe: {"rule": {"over no decay": up(), "over lfu": up()}},
    fate: {"rule": {"quotas": up(), "depth": up()}},
    expertflow: {"rule": {"recall over table": up(), "misses under prior": up(), "experts under random": up()}},
    hobbit: {
        "rule": {"kl, low": up(), "kl, method": up(), "penalty": up()},
        "bytes per token, in experts": {n: up(5.0) for n in ("low", "method", "random, low", "random, method")},
    },
    local_routing_consistency: {
        "rule": {
            "sch over lru": up(),
            "srp over control": up(),
            "srp with lru": {"mean": 0.8, "low": 0.7, "high": 0.9},
            "sch with lru": {"mean": 0.8, "low": 0.7, "high": 0.9},
            "cells above belady": 0,
        }
    },
}
BAD = [
    (hybrimoe, ("rule", "hits", "low"), -0.1),
    (hybrimoe, ("rule", "control", "low"), 0.1),
    (hybrimoe, ("rule", "decode", "low"), 0.0),
    (hybrimoe, ("rule", "prompts", "mean"), -0.1),
    (se_moe, ("rule", "over lfu", "low"), 0.0),
    (fate, ("rule", "quotas", "low"), -0.1),
    (expertflow, ("rule", "misses under prior", "low"), 0.0),
    (hobbit, ("rule", "penalty", "low"), -1.0),
    (hobbit, ("bytes per token, in experts", "random, low", "mean"), 4.8),
    (local_routing_consistency, ("rule", "srp with lru", "low"), 0.4),
    (local_routing_consistency, ("rule", "cells above belady"), 1),
]


@pytest.mark.parametrize("experiment", GOOD)
def test_rules_can_hold(experiment):
    assert experiment.holds(GOOD[experiment])


@pytest.mark.parametrize(("experiment", "path", "value"), BAD)
def test_rules_fail_with_any_figure_they_rest_on(experiment, path, value):
    assert not experiment.holds(changed(GOOD[experiment], path, value))


def test_shuffling_keeps_the_decoded_tokens():
    trace = _caching.decoded(trace_of(), prompt=8)
    mixed = se_moe.shuffled(trace, 0)
    assert len(mixed) == trace.decode.sum() == len(mixed.requests) / 3
    assert sorted(map(tuple, mixed.expert[:, 0].tolist())) == sorted(
        map(tuple, trace.expert[trace.decode][:, 0].tolist())
    )


def test_the_decay_is_the_one_that_hits_most():
    trace = _caching.decoded(trace_of(length=80), prompt=8)
    best = se_moe.choose(trace)
    assert best in se_moe.CHOICES
    hits = [se_moe.replay(trace, one.policy(), 12, phase="decode").hits for one in (best, *se_moe.CHOICES)]
    assert hits[0] == max(hits)


def test_makespans_are_ordered():
    found = hybrimoe.makespans([[1, 5, 3], [2, 2, 8]], np.random.default_rng(0))
    assert found["best"] <= found["greedy"] <= max(found["all fast"], found["as cached"])
    assert found["worst over best"] >= found["greedy over best"] >= 1


def test_recall_by_layer_counts_hits_among_the_first():
    trace = _caching.decoded(trace_of(), prompt=8)
    perfect = fate.usage(trace)
    assert fate.by_layer(perfect, trace, 2) == [1.0] * 3
    assert fate.mean_recall(-perfect, trace, 2) == 0.0
    half = perfect.copy()
    np.put_along_axis(half, trace.expert[..., :1], 0.0, axis=2)
    half[..., :] -= 2 * (fate.usage(trace) - half)
    assert fate.by_layer(half, trace, 2) == [0.5] * 3


def test_missing_experts_come_at_their_level_and_are_kept_in_pools():
    paged = hobbit.Paged(8, Hobbit().precision)
    index = torch.tensor([[0, 1, 2], [0, 1, 2], [2, 0, 1]])
    weight = torch.tensor([[0.65, 0.3, 0.05]] * 3)
    _, at, weights = paged(torch.zeros(3, 4), index, weight)
    # expert 0 whole, 1 in the low pool, 2 left out; then 0 and 1 are there; then 2 is the first and read whole, while
    # 1, now the last, is served from its low copy
    assert at.tolist() == [[0, 9, -1], [0, 9, -1], [2, 0, 9]]
    assert weights[0].tolist() == pytest.approx([0.65, 0.3, 0.0])
    assert paged.read == pytest.approx(2 + hobbit.LOW_COST)
    assert paged.levels == [HIGH, LOW, SKIP, SKIP, HIGH]


def test_a_pool_keeps_its_size_and_low_copies_never_displace_whole_ones():
    paged = hobbit.Paged(16, lambda weight: np.array([[HIGH, LOW]]))
    pairs = torch.stack([torch.arange(8), torch.arange(8, 16)], 1)
    paged(torch.zeros(8, 2), pairs, torch.full((8, 2), 0.5))
    assert list(paged.pools[HIGH]) == [4, 5, 6, 7]
    assert list(paged.pools[LOW]) == [14, 15]


def test_drawn_levels_have_the_frequencies_of_their_layer():
    level = hobbit.drawn([[HIGH, LOW, LOW, LOW], [SKIP]], 0)
    found = level(0)(np.zeros((4000, 1)))
    assert (found == LOW).mean() == pytest.approx(0.75, abs=0.03)
    assert (level(1)(np.zeros((5, 2))) == SKIP).all()


def test_prices_follow_the_heaviest_use_of_a_batch():
    trace = trace_of(length=2)
    trace.expert[:2, 0] = [[0, 1], [1, 2]]
    trace.weight[:2, 0] = [[0.8, 0.2], [0.95, 0.05]]
    assert hobbit.prices(trace)[0] == {0: 1.0, 1: 1.0, 2: 0.0}


def test_analytic_consistency_of_random_routing():
    assert local_routing_consistency.analytic(trace_of(experts=16)) == pytest.approx(0.321, abs=1e-3)
