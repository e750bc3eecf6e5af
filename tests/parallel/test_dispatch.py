"""Layouts, plans and what each rank makes of them: pure, so checked without processes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.bank import SILU_MUL
from moekit.lab.experiments._spread import RELU, bank
from moekit.parallel import DispatchPlan, Grid, Layout, ParallelError, Piece, Traffic, native, shard
from moekit.parallel._shards import assemble
from moekit.parallel._stage import Stage


@st.composite
def plans(draw):
    """Any legal plan with its counts: expert ranges cut anywhere and dealt to any rank, in slices and parts."""
    world, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slices = draw(st.sampled_from([1, 2, 4]))
    parts = draw(st.sampled_from([p for p in (1, 2, 4) if slices % p == 0]))
    ranks = st.integers(0, world - 1)
    counts = draw(
        st.lists(st.lists(st.integers(0, 5), min_size=experts, max_size=experts), min_size=world, max_size=world)
    )
    layout = Layout(world, tuple(draw(ranks) for _ in range(experts * slices)), slices)
    pieces = []
    for expert, load in enumerate(map(sum, zip(*counts, strict=True))):
        for part in range(parts):
            cuts = sorted({0, load, *draw(st.lists(st.integers(0, load), max_size=3))})
            pieces += [Piece(expert, part, a, b, draw(ranks)) for a, b in pairwise(cuts)]
    return DispatchPlan(layout, tuple(draw(st.permutations(pieces))), parts), counts


def rows_of(counts, rank):
    """The sorted rows of a rank, each named by (expert, its number in that expert's global range)."""
    named = []
    for expert, count in enumerate(counts[rank]):
        before = sum(row[expert] for row in counts[:rank])
        named += [(expert, before + i) for i in range(count)]
    return named


@settings(max_examples=150)
@given(plans(), st.integers(1, 3))
def test_stages_send_every_row_where_the_plan_says(planned, chunks):
    """The exchange is played in one process with named rows: all arrive once, in the order that is announced."""
    plan, counts = planned
    plan.check(counts)
    world = plan.layout.world
    computed: dict[tuple[int, int, int], int] = {}
    for chunk in range(chunks):
        stages = [Stage.of(plan, counts, rank, chunk, chunks) for rank in range(world)]
        sent = []
        for rank, stage in enumerate(stages):
            assert stage.rows == stages[0].rows
            names = [rows_of(counts, rank)[row] for row in stage.sent.tolist()]
            sent.append(torch.arange(len(names)).split(stage.rows[rank]))
            sent[-1] = [[names[i] for i in part.tolist()] for part in sent[-1]]
        for rank, stage in enumerate(stages):
            arrived = [name for source in range(world) for name in sent[source][rank]]
            announced = [(e, p) for e, p, count in stage.segments for _ in range(count)]
            assert [expert for expert, _ in arrived] == [expert for expert, _ in announced]
            for (expert, token), (_, part) in zip(arrived, announced, strict=True):
                assert (expert, part, token) not in computed
                computed[expert, part, token] = rank
    wanted = {(p.expert, p.part, t): p.rank for p in plan.pieces for t in range(p.start, p.stop)}
    assert computed == wanted


@settings(max_examples=60)
@given(plans())
def test_every_rank_that_computes_a_part_holds_its_units(planned):
    plan, _ = planned
    held = {(unit, rank) for unit, rank in enumerate(plan.layout.owner)}
    held |= {(move.chunk, move.target) for move in plan.moves}
    assert all(plan.layout.owner[move.chunk] == move.source != move.target for move in plan.moves)
    assert len(set(plan.moves)) == len(plan.moves)
    for piece in plan.pieces:
        if piece.start < piece.stop:
            assert {(unit, piece.rank) for unit in plan.units(piece.expert, piece.part)} <= held


def test_native_plan_moves_nothing():
    counts = [[3, 0, 2, 1], [4, 0, 0, 5]]
    plan = native(counts, Layout.contiguous(4, 2)).check(counts)
    assert plan.moves == ()
    assert plan.rows() == [7, 8]
    sliced = native([[3], [4]], Layout(2, (0, 1), slices=2)).check([[3], [4]])
    assert (sliced.moves, sliced.rows(), sliced.parts) == ((), [7, 7], 2)


def test_contiguous_layout_is_as_even_as_can_be():
    layout = Layout.contiguous(7, 3)
    assert layout.owner == tuple(sorted(layout.owner))
    assert sorted(len(layout.own(rank)) for rank in range(3)) == [2, 2, 3]
    assert layout.fingerprint != Layout.contiguous(7, 4).fingerprint


LAYOUT = Layout.contiguous(2, 2)
WHOLE = (Piece(0, 0, 0, 4, 0), Piece(1, 0, 0, 2, 1))


@pytest.mark.parametrize(
    ("plan", "counts", "message"),
    [
        (DispatchPlan(LAYOUT, WHOLE), [[1, 1]] * 3, "this plan is for 2 ranks, but 3 take part"),
        (DispatchPlan(LAYOUT, WHOLE), [[1, 1, 0]] * 2, "this plan is for 2 experts, the routing for 3"),
        (DispatchPlan(LAYOUT, WHOLE), [[2, 1]] * 2, None),
        (DispatchPlan(LAYOUT, WHOLE), [[2, 2]] * 2, "expert 1 has 4 tokens, the plan's pieces cover 2"),
        (DispatchPlan(LAYOUT, (*WHOLE, Piece(0, 0, 3, 4, 1))), [[2, 1]] * 2, "token 3 of expert 0 is computed twice"),
        (
            DispatchPlan(LAYOUT, (WHOLE[1], Piece(0, 0, 1, 4, 1))),
            [[2, 1]] * 2,
            "token 0 of expert 0 is computed by n",
        ),
        (
            DispatchPlan(LAYOUT, (*WHOLE, Piece(0, 0, 0, 4, 5))),
            [[2, 1]] * 2,
            "expert 0 on rank 5, which does not",
        ),
        (DispatchPlan(LAYOUT, (*WHOLE, Piece(0, 1, 0, 4, 0))), [[2, 1]] * 2, "part 1 of expert 0, which has 1 parts"),
        (DispatchPlan(LAYOUT, WHOLE, parts=2), [[2, 1]] * 2, "in 1 slices cannot be computed in 2 parts"),
        (DispatchPlan(LAYOUT, WHOLE, copies=((7, 0),)), [[2, 1]] * 2, "copies unit 7 to rank 0"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, counts, message):
    if message is None:
        assert plan.check(counts) is plan
        return
    with pytest.raises(ParallelError, match=message):
        plan.check(counts)


def test_layouts_and_grids_that_cannot_be():
    with pytest.raises(ParallelError, match="this layout is for 3 or more ranks, but there are 2"):
        Layout(2, (0, 2))
    with pytest.raises(ParallelError, match="3 units are no whole number of experts in 2 slices"):
        Layout(2, (0, 1, 0), slices=2)
    with pytest.raises(ParallelError, match="6 ranks do not divide over 4 nodes"):
        Grid.of(6, 4)
    with pytest.raises(ParallelError, match="at least one node"):
        Grid(0, 2)


def test_links_of_a_grid():
    grid = Grid.of(6, 3)
    assert [grid.level(2, rank) for rank in range(6)] == ["inter", "inter", "self", "intra", "inter", "inter"]
    assert (grid.node(5), grid.local(5), grid.world) == (2, 1, 6)


def test_traffic_counts_and_adds():
    traffic = Traffic()
    traffic.add("tokens", "inter", 3, 30)
    traffic.add("tokens", "inter", 2, 20)
    traffic.add("tokens", "self", 9, 90)
    traffic.add("weights", "intra", 0, 0)
    assert vars(traffic.total()) == {"messages": 2, "rows": 5, "nbytes": 50}
    assert traffic.total("tokens", "self").messages == 0
    assert Traffic.from_dict(traffic.as_dict()) == traffic
    assert (traffic + traffic).total("tokens").nbytes == 100
    assert traffic.total(["weights"]).nbytes == 0
    traffic.clear()
    assert traffic.total(level="self").rows == 0


@pytest.mark.parametrize("activation", [SILU_MUL, RELU])
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_put_together_are_the_experts(activation, slices):
    whole = bank(3, gated=activation.gated)
    layout = Layout(2, tuple(unit % 2 for unit in range(3 * slices)), slices)
    shards = [shard(whole, layout, rank) for rank in range(2)]
    order = [*layout.own(0), *layout.own(1)]
    place = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    tensors = {n: torch.cat([t, shards[1].tensors()[n]])[place] for n, t in shards[0].tensors().items()}
    together = assemble(type(whole)(**tensors, activation=activation), slices)
    for name, tensor in whole.tensors().items():
        assert torch.equal(together.tensors()[name], tensor), name
    assert shard(whole, Layout(2, (0,) * (3 * slices), slices), 1).num_experts == 0


def test_shards_that_do_not_fit():
    with pytest.raises(ParallelError, match="the layout is for 4 experts, but the bank has 3"):
        shard(bank(3), Layout.contiguous(4, 2), 0)
    with pytest.raises(ParallelError, match="intermediate size of 8 does not divide into 3 slices"):
        shard(bank(1), Layout(3, (0, 1, 2), slices=3), 0)
