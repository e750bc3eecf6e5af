"""Cache policies do what their names say, and pools share a cache out among layers."""

import pytest

from moekit.errors import OptionError
from moekit.run._policies_pools import LayerPools
from moekit.run.policy import policy


def drive(policy, requests, capacity):
    """Misses by request, each a (layer, experts) pair, and what is resident at the end."""
    resident, misses = set(), []
    for layer, experts in requests:
        policy.routed(layer, experts, None)
        needed = {(layer, expert) for expert in experts}
        missing = [key for key in sorted(needed) if key not in resident]
        for key in missing:
            if len(resident) == capacity:
                gone = policy.victim(resident, needed, key)
                assert gone in resident - needed
                resident.remove(gone)
                policy.evicted(gone)
            resident.add(key)
            policy.admitted(key)
        misses.append(len(missing))
    return misses, resident


def test_lru_evicts_the_oldest():
    misses, resident = drive(policy("lru:pool=global"), [(0, [e]) for e in (0, 1, 2, 0, 3, 1)], 3)
    assert misses == [1, 1, 1, 0, 1, 1]
    assert resident == {(0, 0), (0, 3), (0, 1)}


def test_lfu_evicts_the_rarest_and_remembers_the_absent():
    misses, resident = drive(policy("lfu"), [(0, [e]) for e in (0, 0, 0, 1, 2, 2, 1, 1, 0)], 2)
    assert misses == [1, 0, 0, 1, 1, 0, 1, 0, 0]
    assert resident == {(0, 0), (0, 1)}


def test_a_global_lru_starves_on_a_cycle_over_layers_and_pools_do_not():
    cycle = [(layer, [e]) for e in (0, 1, 0, 1, 0, 1, 0) for layer in range(4)]
    assert sum(drive(policy("lru:pool=global"), cycle, 7)[0]) == len(cycle)
    assert sum(drive(policy("lru"), cycle, 8)[0]) == 8


def test_shares_fill_up_after_one_layer_took_everything():
    requests = [(0, range(8)), *[(layer, [e]) for e in (0, 1, 0, 1, 0, 1) for layer in range(4)]]
    _, resident = drive(policy("lru"), requests, 8)
    assert sorted(resident) == [(layer, e) for layer in range(4) for e in (0, 1)]


def test_weights_divide_the_cache():
    unequal = LayerPools(policy("lru:pool=global"), {0: 3.0, 1: 1.0})
    requests = [(layer, [e]) for e in range(8) for layer in (0, 1)]
    _, resident = drive(unequal, requests, 8)
    assert [sum(layer == own for own, _ in resident) for layer in (0, 1)] == [6, 2]


def test_a_batch_wider_than_its_share_borrows():
    requests = [(0, [0, 1]), (1, [0, 1]), (1, [0, 1, 2, 3])]
    misses, resident = drive(policy("lru"), requests, 4)
    assert misses == [2, 2, 2]
    assert resident == {(1, e) for e in range(4)}


def test_nothing_may_go_when_all_is_pinned():
    lru = policy("lru")
    drive(lru, [(0, [0, 1])], 2)
    assert lru.victim({(0, 0), (0, 1)}, {(0, 0), (0, 1)}, (0, 2)) is None


def test_what_the_store_holds_back_is_no_victim():
    lru = policy("lru")
    drive(lru, [(0, [0]), (0, [1])], 2)
    assert lru.victim({(0, 1)}, set(), (0, 2)) == (0, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lrv", "unknown cache policy 'lrv'; did you mean 'lru'"),
        ("lru:pol=layer", "lru has no option 'pol'; did you mean 'pool'"),
        ("lru:pool=half", "lru: pool=half is not layer or global"),
    ],
)
def test_wrong_specifications_name_the_nearest(spec, message):
    with pytest.raises(OptionError, match=message):
        policy(spec)
