"""Tutel: one layout, every degree the same layer on real ranks, and a choice that learns from what things took."""

import pytest
import rank_tutel
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.lab.experiments import tutel as experiment
from moekit.parallel import Layout, ParallelError
from moekit.parallel.tutel import Adaptive, Degree, degrees, stored_layout


def test_layouts_and_their_degrees():
    assert stored_layout(8, 4) == Layout.contiguous(8, 4)
    assert stored_layout(2, 4) == Layout(4, (0, 1, 2, 3), slices=2)
    assert degrees(stored_layout(1, 4)) == [0, 1, 2, 4]
    assert degrees(stored_layout(8, 4)) == [0, 1]
    with pytest.raises(ParallelError, match="3 experts and 4 ranks: one number must divide the other"):
        stored_layout(3, 4)
    with pytest.raises(ParallelError, match=r"no degree 3 with 4 slices: choose one of \[0, 1, 2, 4\]"):
        Degree(3)([[1]] * 4, stored_layout(1, 4))


@settings(max_examples=80)
@given(st.sampled_from([(1, 4), (2, 4), (4, 4), (8, 4), (1, 2)]), st.data())
def test_every_degree_is_a_legal_plan(sizes, data):
    experts, world = sizes
    layout = stored_layout(experts, world)
    counts = [[data.draw(st.integers(0, 9)) for _ in range(experts)] for _ in range(world)]
    total = sum(map(sum, counts))
    for degree in degrees(layout):
        plan = Degree(degree)(counts, layout).check(counts)
        assert sum(plan.rows()) == max(1, degree) * total
        if degree == layout.slices:
            assert plan.moves == ()
        if degree == 0:
            assert plan.rows() == [sum(row) for row in counts]
            assert len(plan.moves) == (world - 1) * len(layout.owner)


def test_groups_gather_whether_they_have_tokens_or_not():
    layout = stored_layout(1, 4)
    assert [len(Degree(r)([[0]] * 4, layout).moves) for r in (0, 1, 2, 4)] == [12, 12, 4, 0]


@pytest.mark.parametrize(("experts", "chunks"), [(1, 2), (2, 1)])
def test_every_degree_chunk_and_exchange_equals_one_process(four_ranks, experts, chunks):
    for found in four_ranks.ask(experiment.against_one_process, experts, (chunks,)):
        assert len(found) == len(degrees(stored_layout(experts, 4))) * 2
        assert max(found.values()) < 1e-6, found


def test_switching_moves_no_weight_and_changes_no_training(four_ranks):
    for found in four_ranks.ask(experiment.switched, 1):
        assert found["unmoved"]
        assert found["training_gap"] < 1e-12
        assert found["trained"] > 1e-3


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_traffic_is_what_the_formulas_say(four_ranks, experts):
    found = experiment.added(four_ranks.ask(experiment.counted, experts, 12 * 4))
    for degree in found["degrees"].values():
        assert degree["bytes"] == degree["formula"]
    assert found["inter_messages"] == {"flat": 8, "two_level": 4}


def test_the_choice_tries_everything_once_and_keeps_the_fastest(two_ranks):
    for found in two_ranks.ask(rank_tutel.chooses):
        assert found == {"tried": [0, 1, 2], "kept": [1, 1], "other_bucket": [0, 1, 2, 2]}


def test_candidates_of_one_layout_only():
    with pytest.raises(ParallelError, match="one engine or more, all of one layout"):
        Adaptive([])
