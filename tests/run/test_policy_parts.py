"""ARC matches its definition; fading, scored and weighted priorities do what their formulas say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.run._policies import Priority
from moekit.run._policies_scored import first_share
from moekit.run.policy import policy


def arc_by_the_book(pages, c):
    """Hits of ARC(c) on single pages, written from figure 4 of the paper with lists (oldest first)."""
    t1, t2, b1, b2, p, hits = [], [], [], [], 0.0, []

    def replace(x):
        if t1 and ((x in b2 and len(t1) == p) or len(t1) > p):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in pages:
        hits.append(x in t1 or x in t2)
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:
            p = min(c, p + max(1, len(b2) / len(b1)))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(b1) < c and len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(x)
            t1.append(x)
    return hits


def hits_of(policy, pages, capacity):
    resident, hits = set(), []
    for page in pages:
        key = (0, page)
        policy.routed(0, [page], None)
        hits.append(key in resident)
        if key in resident:
            continue
        if len(resident) == capacity:
            gone = policy.victim(resident, {key}, key)
            resident.remove(gone)
            policy.evicted(gone)
        resident.add(key)
        policy.admitted(key)
    return hits


@settings(max_examples=200)
@given(st.lists(st.integers(0, 8), max_size=80), st.integers(1, 5))
def test_arc_is_the_published_one(pages, capacity):
    expected = arc_by_the_book(pages, capacity)
    assert hits_of(policy("arc:pool=global"), pages, capacity) == expected
    assert hits_of(policy("arc"), pages, capacity) == expected


def test_arc_survives_a_scan_that_empties_lru():
    pages = [0, 1, 0, 1, *range(2, 12), 0, 1] * 3
    assert sum(hits_of(policy("arc"), pages, 4)) > sum(hits_of(policy("lru"), pages, 4))


def test_decay_forgets_old_fame():
    pages = [0] * 40 + [1, 1, 2, 1, 2, 1, 2] * 6
    keeps, forgets = (sum(hits_of(policy(f"decayed-lfu:decay={d},every=4"), pages, 2)) for d in (1.0, 0.5))
    assert forgets > keeps


def test_threshold_spares_newcomers_until_nobody_else_is_left():
    lfu = policy("decayed-lfu:threshold=2")
    resident = {(0, 0), (0, 1)}
    for expert, uses in ((0, 3), (1, 1)):
        for _ in range(uses):
            lfu.routed(0, [expert], None)
            if (0, expert) not in lfu.inner._uses:
                lfu.admitted((0, expert))
    assert lfu.victim(resident, set(), (0, 2)) == (0, 0)
    assert lfu.victim(resident, {(0, 0)}, (0, 2)) == (0, 1)


def test_scores_are_averaged_over_all_experts_and_cut_to_the_largest():
    aware = policy("score-aware:share=0.5,top=2,pool=global")
    aware.routed(0, [0], [0.5, 0.3, 0.2])
    aware.routed(0, [2], [0.1, 0.4, 0.5])
    assert aware.priorities([(0, e) for e in range(3)]) == pytest.approx([0.125, 0.275, 0.25])
    assert aware.victim({(0, 0), (0, 1), (0, 2)}, {(0, 2)}, (0, 3)) == (0, 0)


def test_score_aware_does_without_scores():
    aware = policy("score-aware:pool=global")
    aware.routed(0, [1, 3], None)
    assert aware.priorities([(0, e) for e in range(5)]) == [0, 0.25, 0, 0.25, 0]


def test_multi_term_is_its_formula():
    weighed = policy("multi-term:recency=0.1,frequency=0.2,weighty=0.3,nearness=0.4")
    scores = [0.5, 0.3, 0.2, 0.0]
    for experts in ([0, 1, 2], [0, 1]):
        for layer in (0, 1):
            weighed.routed(layer, experts, scores)
    # after two steps, standing at layer 1 of 2: layer 0 is one ahead, layer 1 none
    assert weighed.priorities([(0, 0)])[0] == pytest.approx(0.1 * 2 / 2 + 0.2 * 2 / 2 + 0.3 * 2 / 2 + 0.4 * 0.5)
    # before expert 1 lies 0.5 of 1.0, then 0.5 of 0.8: within 0.6 once
    assert weighed.priorities([(1, 1)])[0] == pytest.approx(0.1 * 2 / 2 + 0.2 * 2 / 2 + 0.3 * 1 / 2 + 0.4)
    assert weighed.priorities([(1, 2)])[0] == pytest.approx(0.1 * 1 / 2 + 0.2 * 1 / 2 + 0.3 * 0 / 2 + 0.4)
    weighed.reset()
    assert weighed.priorities([(0, 0)])[0] == weighed.priorities([(0, 3)])[0]


requests = st.tuples(st.integers(0, 2), st.sets(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from("rrrnb"))


@given(st.lists(requests, max_size=40), st.integers(3, 9))
def test_one_ranking_per_request_finds_the_victims_that_ranking_each_time_finds(asked, room):
    weighed, resident = policy("multi-term"), dict[tuple[int, int], None]()
    for layer, experts, what in asked:
        if what == "n":
            weighed.reset()
        keys = [(layer, expert) for expert in sorted(experts)]
        if what != "b":  # else read ahead: asked for victims without being routed
            weighed.routed(layer, sorted(experts), None)
        for key in keys:
            if key in resident:
                continue
            if len(resident) == room:
                victim = weighed.victim(resident, set(keys), key)
                assert victim == Priority.victim(weighed, resident, set(keys), key)
                if victim is None:
                    continue
                del resident[victim]
                weighed.evicted(victim)
            resident[key] = None
            weighed.admitted(key)


def test_first_share_counts_what_comes_before():
    scores = np.array([0.6, 0.3, 0.1])
    assert first_share([0, 1, 2], scores, 0.6) == [0, 1]
    assert first_share([0, 1, 2], scores, 0.5) == [0]
    assert first_share([1, 2], scores, 0.0) == [1]
    assert first_share([2, 1], None, 0.1) == [2, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("decayed-lfu:decay=1.5", "decay=1.5.*above 0 and at most 1"),
        ("decayed-lfu:every=0", "every=0.*every 1 or more"),
        ("score-aware:share=0", "share=0.*above 0"),
    ],
)
def test_values_out_of_range(spec, message):
    with pytest.raises(OptionError, match=message):
        policy(spec)
