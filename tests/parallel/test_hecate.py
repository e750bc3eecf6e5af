"""Hecate: lending, locality and sharding by hand and by property; real ranks, Adam included, in one question."""

import pytest
import rank_hecate
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.lab.experiments import hecate as experiment
from moekit.parallel import Grid, Layout, ParallelError, Piece
from moekit.parallel.hecate import Hecate, heterogeneous, materialise, nearest

GRID = Grid(2, 2)
LAYOUT = Layout.contiguous(4, 4)


def test_few_hot_experts_go_everywhere():
    lent = materialise([9, 1, 0, 5], LAYOUT, GRID, overlap=2, extra=2)
    assert lent == ((0, 1), (0, 2), (0, 3), (3, 0), (3, 1), (3, 2))


def test_slots_follow_load_and_nodes_without_the_expert_come_first():
    """4 slots for experts of load 9, 3: three replicas and one. Expert 0 is on node 0: node 1 gets the first."""
    lent = materialise([9, 0, 0, 3], LAYOUT, GRID, overlap=2, extra=1)
    assert lent == ((0, 2), (0, 1), (0, 3), (3, 0))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(0, 4), st.integers(0, 3))
def test_no_rank_lends_more_room_than_it_has(load, overlap, extra):
    lent = materialise(load, LAYOUT, GRID, overlap, extra)
    assert len(set(lent)) == len(lent)
    assert all(rank != LAYOUT.owner[expert] and load[expert] > 0 for expert, rank in lent)
    assert len({expert for expert, _ in lent}) <= overlap
    for rank in range(4):
        assert sum(r == rank for _, r in lent) <= max(extra, 0)
    again = materialise(load, LAYOUT, GRID, overlap, extra, held=lent)
    assert not set(again) & set(lent)


def test_tokens_go_to_the_nearest_replica():
    """Expert 0 lives on ranks 0 and 3: rank 1 asks its node, rank 3 itself; expert 2 lives on rank 2 alone."""
    counts = [[2, 0, 1, 0], [3, 0, 0, 0], [4, 0, 0, 0], [5, 0, 2, 0]]
    plan = nearest(counts, LAYOUT, GRID, ((0, 3),)).check(counts)
    assert sorted(plan.pieces) == [
        Piece(0, 0, 0, 2, 0),
        Piece(0, 0, 2, 5, 0),
        Piece(0, 0, 5, 9, 3),
        Piece(0, 0, 9, 14, 3),
        Piece(2, 0, 0, 1, 2),
        Piece(2, 0, 1, 3, 2),
    ]
    shared = nearest([[0] * 4, [0] * 4, [0] * 4, [0, 0, 6, 0]], Layout(4, (0, 0, 0, 0)), GRID, ((2, 1),))
    assert shared.rows() == [3, 3, 0, 0]
    own = nearest([[0] * 4, [0, 0, 6, 0], [0] * 4, [0] * 4], Layout(4, (0, 0, 0, 0)), GRID, ((2, 1),))
    assert own.rows() == [0, 6, 0, 0]


@settings(max_examples=100)
@given(st.data())
def test_plans_are_legal_and_learn_only_from_the_past(data):
    planner = Hecate(GRID, overlap=data.draw(st.integers(1, 4)), extra=data.draw(st.integers(1, 2)), window=2)
    loads = []
    for _ in range(4):
        counts = [[data.draw(st.integers(0, 5)) for _ in range(4)] for _ in range(4)]
        expected = planner.predicted()
        assert expected == [sum(column) / len(loads[-2:]) for column in zip(*loads[-2:], strict=True)]
        plan = planner(counts, LAYOUT).check(counts)
        assert plan.copies == (materialise(expected, LAYOUT, GRID, planner.overlap, planner.extra) if expected else ())
        loads.append([sum(column) for column in zip(*counts, strict=True)])


def test_calibration_pays_for_itself_or_is_left():
    skewed = [[8, 0, 0, 0]] * 4
    for exposed, lent in ((0.0, True), (1000.0, False)):
        planner = Hecate(GRID, overlap=1, extra=0, spare=1, exposed=exposed)
        assert bool(planner(skewed, LAYOUT).copies) is lent


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 20), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 6))
def test_sharding_gives_equal_slots_over_all_layers(loads, overlap):
    layouts = heterogeneous(loads, GRID, overlap)
    owned = [sum(len(layout.own(rank)) for layout in layouts) for rank in range(4)]
    assert max(owned) <= -(-6 * len(loads) // 4)
    assert sum(owned) == 6 * len(loads)


def test_sharding_balances_what_is_not_lent():
    """Loads 9 8 7 6 without lending: greedy by rank gives every rank one; lending the top 2 frees the others."""
    (one,) = heterogeneous([[9, 8, 7, 6]], GRID, 0)
    assert sorted(one.owner) == [0, 1, 2, 3]
    (two,) = heterogeneous([[9, 8, 7, 6]], GRID, 2)
    assert {GRID.node(two.owner[2]), GRID.node(two.owner[3])} == {0, 1}


def test_slices_are_refused():
    with pytest.raises(ParallelError, match="replicas are whole experts, but the layout has 2 slices"):
        materialise([1], Layout(2, (0, 1), slices=2), Grid(1, 2), 1, 1)


def test_training_on_real_ranks_equals_one_process(four_ranks):
    answers = four_ranks.ask(experiment.against_one_process)
    for found in answers:
        assert found["gap"] < 1e-6
        assert found["adam_gap"] < 1e-9
        assert found["foreign_state"] == 0
    total = {what: sum(found["bytes"][what] for found in answers) for what in ("weights", "gradients", "formula")}
    assert total["weights"] == total["gradients"] == total["formula"] > 0


def test_resharding_moves_only_what_changes_hands(four_ranks):
    found = four_ranks.ask(rank_hecate.moves_house)
    assert all(one["right"] for one in found)
    assert sum(one["sent"] for one in found) == 2 * 3 * 8
    assert all("differ in more than who stores what" in one["refused"] for one in found)
