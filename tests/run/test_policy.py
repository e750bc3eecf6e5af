"""Cache policies do what their names say, and pools share a cache out among layers."""

import numpy as np
import pytest

from moekit.errors import OptionError, ProfileError
from moekit.run._policies_pools import LayerPools
from moekit.run.defaults import usual
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
        ("lru:_clock=3", "lru has no option '_clock'"),
        ("lru:quota=2+1", "lru has no option 'quota'; did you mean 'quotas'"),
        ("lru:quotas=2+x", r"quotas=2\+x are not numbers, such as 4\+2\+1"),
        ("lru:quotas=0+0", r"quotas=0\+0: none may be below 0, and not all of them 0"),
        ("lru:quotas=2+-1", r"quotas=2\+-1: none may be below 0"),
        ("lru:hot=1.5", r"hot=1.5: give a share of all experts above 0 and at most 1, or a number of them"),
        ("lru:hot=0", r"hot=0: give a share"),
    ],
)
def test_wrong_specifications_name_the_nearest(spec, message):
    with pytest.raises(OptionError, match=message):
        policy(spec)


@pytest.mark.parametrize("spec", ["lru:quotas=3+1", "lru:pool=global,quotas=3+1", "lfu:quotas=3+1"])
def test_quotas_divide_the_cache_and_the_last_holds_for_all_further_layers(spec):
    requests = [(layer, [e]) for e in range(10) for layer in (0, 1, 2)]
    _, resident = drive(policy(spec), requests, 10)
    assert [sum(layer == own for own, _ in resident) for layer in (0, 1, 2)] == [6, 2, 2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A profile of two layers of four experts, of which (1, 2) and (0, 3) are chosen most."""
    from moekit.profile import Profile
    from moekit.profile.layer import LayerProfile

    counts = [[5.0, 1.0, 2.0, 7.0], [3.0, 0.0, 9.0, 1.0]]
    layers = {
        f"layer{i}": LayerProfile(f"layer{i}", i, 4, 1, ("text",), {"counts": np.reshape(one, (1, 1, 1, 4)) / 4.0})
        for i, one in enumerate(counts)
    }
    path = tmp_path_factory.mktemp("seen") / "seen.profile"
    Profile("f" * 64, "some", ("text",), layers).save(path)
    return path


def test_hot_experts_of_a_profile_go_last(seen):
    cycle = [(layer, [e]) for e in (0, 1, 2, 3, 0, 1) for layer in (0, 1)]
    for hot, kept in (("0.25", {(1, 2), (0, 3)}), ("1", {(1, 2)}), ("0.5", {(1, 2), (0, 3), (0, 0), (1, 0)})):
        _, resident = drive(policy(f"lru:pool=global,pinned={seen},hot={hot}"), cycle, 5)
        assert kept <= resident
    # all of them pinned: one goes nevertheless
    assert len(drive(policy(f"lru:pinned={seen},hot=1.0"), cycle, 3)[1]) == 3


def test_a_profile_of_another_model_is_refused(seen, tmp_path):
    policy(f"lru:pinned={seen}", "f" * 64)
    with pytest.raises(ProfileError, match="the profile is of another model"):
        policy(f"lru:pinned={seen}", "0" * 64)
    with pytest.raises(ProfileError, match=r"none\.profile"):
        policy(f"lru:pinned={tmp_path / 'none.profile'}")


def test_the_usual_choice_depends_on_what_fits():
    assert [str(usual(share, 4)) for share in (1.0, 0.9, 0.1)] == ["lru", "multi-term, 4 ahead", "multi-term, 4 ahead"]
