"""HybriMoE: scored caching, the simulated split and prefetching by its impact."""

from routings import random_trace

from moekit.run.hybrimoe import HybriMoE
from moekit.run.replay import bound, replay
from moekit.run.schedule import Costs, best_split


def test_decode_with_the_release_constants_is_optimal():
    """One token each: whatever is cached, the greedy split ends with the exhaustive optimum."""
    for cached in range(9):
        known = [e < cached for e in range(8)]
        assert HybriMoE().schedule([1] * 8, known).makespan == best_split([1] * 8, known, Costs()).makespan


def test_its_cache_stays_within_the_bound():
    trace = random_trace(1)
    assert 0 < replay(trace, HybriMoE().policy(), 9).hits <= bound(trace, 9).hits


def test_prefetch_takes_what_shortens_the_schedule_while_the_link_is_idle():
    method = HybriMoE(costs=Costs(slow=1.0, cold=0.0, fast=0.5, move=2.0))
    wanted = {1: {4: 6, 5: 1}, 2: {7: 1}}
    assert method.prefetch(wanted, {(1, 0)}, idle=1.9) == []
    assert method.prefetch(wanted, {(1, 0)}, idle=2.0) == [(1, 4)]
    assert (1, 4) not in method.prefetch(wanted, {(1, 4)}, idle=20.0)
    assert method.prefetch({}, set(), idle=20.0) == []
