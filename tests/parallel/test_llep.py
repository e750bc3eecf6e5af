"""LLEP: a plan by hand, what every plan must be, and exactness with real ranks (chunk 1 splits every batch)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.lab.experiments import llep as experiment
from moekit.parallel import Layout, ParallelError, Piece, native
from moekit.parallel.llep import LLEP, transfer_bounds


@st.composite
def loads(draw):
    world = draw(st.integers(2, 5))
    experts = draw(st.integers(1, 8))
    size = st.one_of(st.integers(0, 4), st.integers(0, 400))
    return [[draw(size) for _ in range(experts)] for _ in range(world)], Layout.contiguous(experts, world)


def test_a_plan_by_hand():
    """Expert 0 of rank 0 has 10 of 12 tokens: rank 0 keeps what the cap of 6 leaves beside expert 1's one token."""
    plan = LLEP(chunk=1)([[6, 1, 0, 1], [4, 0, 0, 0]], Layout.contiguous(4, 2))
    assert sorted(plan.pieces) == [
        Piece(0, 0, 0, 5, 0),
        Piece(0, 0, 5, 10, 1),
        Piece(1, 0, 0, 1, 0),
        Piece(3, 0, 0, 1, 1),
    ]
    assert plan.rows() == [6, 6]
    assert [(m.chunk, m.source, m.target) for m in plan.moves] == [(0, 0, 1)]


def test_pending_native_work_is_not_forgotten():
    """Rank 1's own expert is still to come when expert 0 is spilled: it must not be handed the whole excess."""
    plan = LLEP(chunk=1)([[12, 0, 0], [0, 6, 0], [0, 0, 0]], Layout(3, (0, 1, 2)))
    assert plan.rows() == [6, 6, 6]
    assert {p.rank for p in plan.pieces if p.expert == 0} == {0, 2}


@settings(max_examples=200)
@given(loads(), st.sampled_from([1, 8, 64]), st.sampled_from([1.0, 1.1]))
def test_plans_are_legal_and_bounded(case, chunk, capacity):
    counts, layout = case
    plan = LLEP(threshold=1, capacity=capacity, chunk=chunk)(counts, layout).check(counts)
    total = sum(map(sum, counts))
    cap = int(capacity * (total // layout.world))
    if plan != native(counts, layout):
        over = chunk * (layout.world - 1) + layout.world
        assert max(plan.rows()) <= max(cap + over, -(-total // layout.world))
    if chunk == 1 and capacity == 1.0:
        assert max(plan.rows()) <= total // layout.world + layout.world


@settings(max_examples=100)
@given(loads())
def test_balanced_loads_stay_native(case):
    counts, layout = case
    rows = native(counts, layout).rows()
    plan = LLEP(threshold=1.3)(counts, layout)
    if max(rows) * layout.world < 1.3 * sum(rows):
        assert plan == native(counts, layout)
        assert plan.moves == ()


def test_bounds_of_transfers():
    counts = [[40, 30, 0, 0, 2, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert transfer_bounds(counts, Layout.contiguous(6, 3)) == (2, 3)
    assert transfer_bounds([[5, 5], [0, 0]], Layout.contiguous(2, 2)) == (0, 0)


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"capacity": 0.9}, {"chunk": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ParallelError, match="must all be 1 or more"):
        LLEP(**options)


def test_slices_are_refused():
    with pytest.raises(ParallelError, match="need whole experts, but the layout has 2 slices"):
        LLEP()([[1], [1]], Layout(2, (0, 1), slices=2))


def test_real_ranks_equal_one_process(two_ranks, four_ranks):
    for ranks in (two_ranks, four_ranks):
        for found in ranks.ask(experiment.against_one_process):
            assert max(found.values()) < 1e-6, found


def test_rule_of_the_experiment():
    good = {
        "gap": {"2": 1e-7},
        "plans": {"1": {"rows_over_bound": 0, "transfers_outside_bounds": 0}},
        "speed_up": {"forward": {"low": 1.2}, "training": {"low": 1.1}},
    }
    assert experiment.holds(good)
    assert not experiment.holds({**good, "gap": {"2": 1e-5}})
    assert not experiment.holds({**good, "speed_up": {"forward": {"low": 1.2}, "training": {"low": 0.9}}})
    assert not experiment.holds({**good, "plans": {"1": {"rows_over_bound": 1, "transfers_outside_bounds": 0}}})
