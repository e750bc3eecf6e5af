"""Nested experts paged plane by plane: the bits of the resident model, fewer bytes, and the order of reading."""

import importlib
from itertools import permutations

import miniatures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.checkpoint import Checkpoint
from moekit.compress import sequence
from moekit.errors import BudgetError, OptionError
from moekit.plan import apply, make_plan
from moekit.profile import profile as observe
from moekit.run import load, paging
from moekit.run._planes_order import WidestFirst, makespan, plane_order
from moekit.run.policy import policy
from moekit.stream import LoadedModel
from reloading import reload_here

IDS = torch.randint(5, 90, (1, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def _reload_here():
    """Outputs are loaded again in this process; that a new one loads them too is tested in tests/plan."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("moekit.plan.apply")
        patch.setattr(module, "reload_in_fresh_process", reload_here)
        yield


def nested(ref, folder, spec):
    source = Checkpoint.open(ref)
    rows = [np.arange(3 + i, 63 + i) for i in range(4)]
    seen = observe(LoadedModel.load(source, dtype=torch.float32), {"all": rows}, held_out=0.0, sample=128, trace=0)
    apply(source, make_plan(sequence([spec]), source, seen, None), folder, format="moekit")
    return Checkpoint.open(folder)


@pytest.fixture(scope="module", params=["fused", "decoded", "widest"])
def checkpoint(request, tmp_path_factory):
    """Kernels that read planes where they lie, those that decode tiles, and planes without heads."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "fused":
        sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
        return nested(miniatures.plain(folder / "plain", **sizes), folder / "nested", "d2moe:price=0.002")
    ref = miniatures.plain(folder / "plain")
    return nested(ref, folder / "nested", f"d2moe:price={0.02 if request.param == 'decoded' else 0},group_size=8")


@pytest.fixture
def opened():
    models = []

    def make(checkpoint, share=None, **options):
        models.append(load(checkpoint, **options))
        if share is not None:
            store = paging(models[-1]).store
            one = max(tier.unit for tier in store.layers)
            store.resize(max(int(share * paging(models[-1]).expert_bytes), one))
        return models[-1]

    yield make
    for model in models:
        paging(model).close()


@torch.no_grad()
def steps(model):
    """Logits of a prompt and of three tokens after it."""
    output = model(input_ids=IDS[:, :11], use_cache=True)
    found = [output.logits[0, -1]]
    for at in range(11, 14):
        output = model(input_ids=IDS[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits[0, -1])
    return torch.stack(found)


@pytest.fixture(scope="module")
def resident(checkpoint):
    return steps(LoadedModel.load(checkpoint).model)


@pytest.mark.parametrize("options", [{"policy": "lru"}, {"policy": "score-aware", "ahead": 2}, {"policy": "arc"}])
@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_logits_are_the_resident_models(opened, checkpoint, resident, share, options):
    model = opened(checkpoint, share, **options)
    assert torch.equal(steps(model), resident)
    served = paging(model)
    assert served.store.counters.misses > 0
    assert served.store.held_bytes <= served.store.budget


def test_room_for_less_than_one_expert_at_its_widest_is_refused(opened, checkpoint):
    store = paging(opened(checkpoint)).store
    with pytest.raises(BudgetError, match="are left for experts, but a single one takes"):
        store.resize(max(tier.unit for tier in store.layers) - 1)


def test_only_planes_that_some_token_wants_are_read(opened, checkpoint):
    served = paging(opened(checkpoint, policy="lru"))
    steps_of = steps(opened(checkpoint))
    assert torch.isfinite(steps_of).all()
    tier = served.store.layers[0]
    module = served.blocks[0].experts
    if module.rewrite is None:
        assert tier.places([1]) == [tier.levels + level for level in range(tier.levels)]
    else:
        assert tier.places([tier.levels, 2]) == [tier.levels, 0, 1, 2]
        assert tier.wanted(torch.tensor([[2, -1], [0, tier.levels]])) == [0, 1, 2, tier.levels]
    assert tier.foreseen([3, 1]) == [3 * tier.levels, tier.levels]
    assert list(tier.scored([0.5, 0.25]))[: tier.levels] == [0.5 / 2**level for level in range(tier.levels)]


def test_a_bound_on_planes_narrows_what_serves_the_fewest(opened, checkpoint, resident):
    model = opened(checkpoint, policy="lru")
    served = paging(model)
    tier = served.store.layers[0]
    if served.blocks[0].experts.rewrite is None:
        served.planes = 0  # there is one width only, and nothing can be narrower
        assert torch.equal(steps(model), resident)
        return
    levels = tier.levels
    index = torch.tensor([[2, levels + 1], [2, -1], [1, levels]])
    assert torch.equal(tier.lowered(index, (), 9), index)
    assert tier.lowered(index, (), 0).tolist() == [[0, levels], [0, -1], [0, levels]]
    assert tier.lowered(index, (), 1).tolist() == [[1, levels], [1, -1], [1, levels]]
    assert tier.lowered(index, {levels + 1}, 2).tolist() == index.tolist()
    assert tier.chosen(index).tolist() == [[0, 1], [0, -1], [0, 1]]
    served.planes = 0
    assert not torch.equal(steps(model), resident)
    assert all(place % levels == 0 for _, place in served.store.resident())
    served.planes = 10**6
    assert torch.equal(steps(model), resident)


@pytest.mark.parametrize("name", ["previous-token", "frequency"])
def test_predictors_hear_of_experts_and_not_of_planes(opened, checkpoint, resident, name):
    from moekit.profile.trace import record
    from moekit.run.predict import predictor

    model = opened(checkpoint, policy="lru")
    served = paging(model)
    served.predictor = predictor(name, seen=record(LoadedModel.load(checkpoint).model, [IDS[0]]))
    served.width = 2
    assert torch.equal(steps(model), resident)


def test_narrow_tokens_cost_fewer_bytes(opened, tmp_path):
    ref = miniatures.plain(tmp_path / "plain")
    read = []
    for price in ("0", "1000000"):
        model = opened(nested(ref, tmp_path / price, f"d2moe:price={price},group_size=8"), policy="lru")
        steps(model)
        read.append(paging(model).store.counters.demand_bytes)
    assert read[1] < 0.75 * read[0]


def test_nested_experts_have_no_stand_ins(tmp_path):
    ref = miniatures.plain(tmp_path / "plain")
    apply(Checkpoint.open(ref), make_plan(sequence(["rtn:bits=4"]), Checkpoint.open(ref), None, None), tmp_path / "low")
    wide = nested(ref, tmp_path / "nested", "d2moe:price=0,group_size=8")
    with pytest.raises(OptionError, match="does not hold all"):
        load(wide, stand_in=tmp_path / "low", read=lambda expert_TK, weight_TK: {})


DEMAND = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4).map(np.array)


@given(DEMAND)
@settings(max_examples=60)
def test_every_wanted_plane_is_read_once_and_after_those_below(demand_EL):
    order = plane_order(demand_EL)
    assert len(set(order)) == len(order)
    for expert, row in enumerate(demand_EL):
        top = np.flatnonzero(row)[-1] if row.any() else -1
        assert [level for e, level in order if e == expert] == list(range(top + 1))


def test_the_hottest_head_is_read_first():
    demand_EL = np.array([[1, 5, 0], [3, 0, 2], [0, 0, 0]])
    assert plane_order(demand_EL) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def legal(order):
    return all(order.index((e, level - 1)) < order.index((e, level)) for e, level in order if level)


def test_makespan_is_between_the_bound_and_the_order_of_ids():
    draw, gains = np.random.default_rng(0), []
    for _ in range(30):
        demand_EL = draw.poisson(draw.gamma(0.5, 4.0, (2, 1)) * np.array([[1.0, 1.0, 1.0]]))
        order = plane_order(demand_EL)
        if len(order) < 2:
            continue
        costs = demand_EL, [2.0, 1.0, 1.0], [0.3, 0.4, 0.5]
        best = min(makespan(one, *costs) for one in permutations(order) if legal(one))
        assert best <= makespan(order, *costs) + 1e-9
        gains.append(makespan(sorted(order), *costs) - makespan(order, *costs))
    assert np.mean(gains) > 0
    with pytest.raises(AssertionError, match="a level was read before"):
        makespan([(0, 1)], np.array([[1, 1]]), [1.0, 1.0], [1.0, 1.0])


def test_high_planes_of_the_layer_just_computed_go_first():
    planes = WidestFirst(levels=3)
    there = [(layer, place) for layer in (0, 1, 2) for place in (0, 1, 2)]
    for layer in (0, 1, 2, 0, 1):
        planes.routed(layer, [0, 1, 2], None)
    gone = []
    while there:
        gone.append(planes.victim(there, set(), (2, 5)))
        there.remove(gone[-1])
    assert gone == [(layer, place) for layer in (1, 0, 2) for place in (2, 1, 0)]


def test_paging_under_it_is_exact(opened, checkpoint, resident):
    model = opened(checkpoint, 0.3, policy=policy("lru"))
    paging(model).store.clear(WidestFirst(levels=paging(model).store.layers[0].levels))
    assert torch.equal(steps(model), resident)
