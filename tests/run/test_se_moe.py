"""SE-MoE: its storage formula, its ring and its ranks per task."""

from itertools import product

import pytest
from routings import random_trace

from moekit.errors import BudgetError, OptionError
from moekit.run.replay import bound, replay
from moekit.run.se_moe import SEMoE, Storage, ranks_by_task


def test_without_decay_it_is_lfu_and_never_beats_the_bound():
    trace = random_trace(0, steps=200)
    plain, decayed = (replay(trace, SEMoE(decay=d, every=4).policy(), 9).hits for d in (1.0, 0.8))
    assert plain != decayed
    assert max(plain, decayed) <= bound(trace, 9).hits


def test_ring_is_its_formula_and_more_slots_change_nothing_in_the_steady_state():
    for slots in (2, 4):
        assert SEMoE(slots=slots).ring_time([2.0] * 20, [3.0] * 20) == 60.0
        # twenty layers, of which the first `slots` are there; the link is the bottleneck from the first free slot on
        assert SEMoE(slots=slots).ring_time([3.0] * 20, [2.0] * 20) == 2.0 + 3.0 * (20 - slots) + 2.0


def test_storage_is_the_papers_inequalities():
    needs = Storage.of(dense=10, sparse=1000, active=0.1, layers=4)
    assert (needs.device, needs.host, needs.disk) == (260.0, 1600.0, 12000)
    needs.check(device=130, host=800, disk=6000, devices=2)
    with pytest.raises(BudgetError, match=r"needs 6e.03 bytes of disk memory on each of 2 devices, found 5e.03"):
        needs.check(device=130, host=800, disk=5000, devices=2)


def test_ranks_by_task_is_the_optimum_by_enumeration():
    for load in ([5.0, 1.0, 3.0], [8.0, 8.0, 1.0], [2.0, 9.0, 4.0]):
        for ranks in range(3, 9):
            splits = [n for n in product(range(1, ranks + 1), repeat=3) if sum(n) == ranks]
            best = min(max(one / n for one, n in zip(load, split, strict=True)) for split in splits)
            given = ranks_by_task(load, ranks)
            assert sum(given) == ranks
            assert max(one / n for one, n in zip(load, given, strict=True)) == best
    with pytest.raises(OptionError, match="2 ranks for 3 tasks"):
        ranks_by_task([1.0, 1.0, 1.0], 2)
