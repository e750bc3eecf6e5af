"""ExpertFlow: slots by demand, and a cache that keeps what is foreseen."""

from routings import random_trace

from moekit.run._predictors_seen import Oracle
from moekit.run.expertflow import Foreseeing, Foresight, slots
from moekit.run.policy import policy
from moekit.run.replay import bound, replay


def test_slots_go_to_the_earliest_layers():
    assert slots([3, 2], 4) == [3, 1]
    assert slots([3, 2, 2], 4) == [3, 1, 0]
    assert slots([1, 1], 4) == [1, 1]


def test_foreseen_experts_stay_and_passed_layers_go_first():
    kept = Foresight()
    kept.routed(0, [0, 1], None)
    kept.foresee(0, [[(2, 1.0)], [(3, 1.0)]])
    resident = {(0, 5), (1, 2), (1, 4), (2, 3)}
    for key in resident:
        kept.admitted(key)
    assert kept.victim(resident, {(0, 5)}, (1, 0)) == (1, 4)
    assert kept.victim({(1, 2), (2, 3)}, set(), (1, 0)) == (2, 3)
    kept.routed(1, [2], None)
    assert kept.victim({(1, 2), (2, 3)}, set(), (1, 0)) == (1, 2)


def test_with_perfect_foresight_it_beats_lru_and_stays_within_the_bound():
    trace = random_trace(3, steps=100)
    foresight = Foresight()
    oracle = Foreseeing(Oracle(trace.requests, 3), foresight, 3, depth=8)
    found = replay(trace, foresight, 6, oracle, width=2)
    assert found.hit_rate == 1
    assert found.useless_prefetch_bytes == 0
    reads = found.misses + found.prefetches
    assert bound(trace, 6).misses <= reads
    assert found.misses < replay(trace, policy("lru"), 6).misses
