"""The plan document: what it says, what it refuses, and that nothing is lost on the way to disk and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.errors import OutputError, PlanError
from moekit.plan import LayerPlan, Permutation, Plan, StoredExpert
from moekit.plan.check import check_layer

E, WIDTH = 6, 5
NAME = "model.layers.0.mlp"


@st.composite
def layer_plans(draw: st.DrawFn, num_experts: int | None = None, bits: bool = True) -> LayerPlan:
    count = num_experts or draw(st.integers(2, E))
    stored = []
    for _ in range(draw(st.integers(1, count))):
        sources = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
        parts = tuple((s, draw(st.sampled_from([1.0, 0.5, 0.1, -2.0]))) for s in sources)
        orders = [draw(st.none() | st.permutations(range(WIDTH)).map(Permutation.of)) for _ in parts]
        identity = Permutation.of(range(WIDTH))
        orders = [None if order == identity else order for order in orders]
        width = draw(st.sampled_from([2, 4, 8, 16])) if bits else 16
        stored.append(StoredExpert(parts, width, 64, tuple(orders) if any(orders) else ()))
    kept = sorted(draw(st.sets(st.integers(0, count - 1), min_size=len(stored))))
    slots = draw(st.permutations([*range(len(stored)), *[-1] * (len(kept) - len(stored))]))
    rows = tuple(((k, 1.0),) for k in kept)
    return LayerPlan(num_experts=count, experts=tuple(stored), slots=tuple(slots), rows=rows, why="drawn")


def checkpoint(num_experts: int = 8, top_k: int = 2, groups: tuple[int, int] | None = None) -> SimpleNamespace:
    layer = SimpleNamespace(name=NAME, num_experts=num_experts, top_k=top_k, groups=groups, users=1)
    return SimpleNamespace(fingerprint="f" * 64, moe_layers=(layer,))


def plan(layer: LayerPlan, **more: object) -> Plan:
    return Plan(source="f" * 64, layers={NAME: layer}, **more)


@given(layer_plans())
def test_a_saved_plan_comes_back_the_same(tmp_path_factory: pytest.TempPathFactory, layer: LayerPlan) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    before = plan(layer, profile="p", methods=("reap:keep=0.5", "rtn:bits=8"), extra="drop")
    before.save(path)
    after = Plan.load(path)
    assert after == before
    assert after.fingerprint == before.fingerprint
    assert after.diff(before) == []


def test_the_file_reads_one_line_per_expert_and_diffs(tmp_path) -> None:
    first = plan(LayerPlan.keep([0, 3, 5], 8, why="reap keeps 3 of 8"))
    second = plan(LayerPlan.keep([0, 3, 6], 8, why="reap keeps 3 of 8").with_bits([16, 8, 16]))
    second.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '        {"from": 3, "bits": 8, "group_size": 64},\n' in text
    assert '"rows": [0, 3, 6]' in text
    assert not (tmp_path / "plan.safetensors").exists()
    assert first.diff(second) == [
        f"{NAME}: no longer keeps experts 5",
        f"{NAME}: now keeps experts 6",
        f"{NAME}: expert 3: 16 bits in groups of 64 -> 8 in 64",
    ]
    assert first.diff(Plan(source="0", layers={}))[-1] == f"{NAME}: named -> not named"


def test_saving_never_overwrites_unasked(tmp_path) -> None:
    path = tmp_path / "plan.json"
    plan(LayerPlan.identity(4)).save(path)
    with pytest.raises(OutputError, match="exists"):
        plan(LayerPlan.keep([0, 1], 4)).save(path)
    plan(LayerPlan.keep([0, 1], 4)).save(path, overwrite=True)
    assert len(Plan.load(path).layers[NAME].experts) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the plan"):
        plan(LayerPlan.identity(4)).save(tmp_path / "file" / "plan.json")


def test_orders_of_another_plan_are_noticed(tmp_path) -> None:
    merged = StoredExpert(((0, 0.5), (1, 0.5)), orders=(None, Permutation.of([1, 0, 2])))
    first = plan(LayerPlan.aliased([merged], [0, 0]))
    first.save(tmp_path / "plan.json")
    other = replace(merged, orders=(None, Permutation.of([2, 0, 1])))
    plan(LayerPlan.aliased([other], [0, 0])).save(tmp_path / "other.json")
    (tmp_path / "other.safetensors").replace(tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="does not belong to"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(PlanError, match="needs the hidden-unit orders"):
        Plan.load(tmp_path / "plan.json")


def _blank(rows: int = 2) -> LayerPlan:
    return LayerPlan.keep(range(rows), 8)


NONSENSE = {
    "expert 8 does not exist": LayerPlan.keep([0, 8], 8),
    "expert -1 does not exist": replace(_blank(), rows=(((-1, 1.0),), ((1, 1.0),))),
    "no expert is kept": LayerPlan.keep([], 8),
    "fewer than the top-k of 2": LayerPlan.keep([3], 8),
    "the coefficient of expert 1 is nan": LayerPlan.aliased([StoredExpert(((0, 1.0), (1, math.nan)))], [0] * 8),
    "is inf, expected a finite number": replace(_blank(), rows=(((0, math.inf),), ((1, 1.0),))),
    "5 bits is a precision no format has": _blank().with_bits(5),
    "group_size 0 must be positive": _blank().with_bits(8, 0),
    "slot 1 calls stored expert 2, but there are 2": replace(_blank(), slots=(0, 2)),
    "slot 0 calls stored expert -2": replace(_blank(), slots=(-2, 1)),
    "1 slots for 2 router rows": replace(_blank(), slots=(0,)),
    "two router rows of the output are the same": replace(_blank(), rows=(((1, 1.0),), ((1, 1.0),))),
    "stored expert 1 is called by no router row": replace(_blank(), slots=(0, 0)),
    "made of nothing": LayerPlan.aliased([StoredExpert(())], [0] * 8),
    "2 hidden-unit orders for 1 parts": LayerPlan.aliased([StoredExpert(((0, 1.0),), orders=(None, None))], [0] * 8),
    "is no permutation": LayerPlan.aliased([StoredExpert(((0, 1.0),), orders=(Permutation.of([0, 0, 1]),))], [0] * 8),
    "the plan is for 4 experts, the model has 8": LayerPlan.keep([0, 1], 4),
}


@pytest.mark.parametrize("message", NONSENSE)
def test_nonsense_is_refused_in_one_clear_line(message: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(NONSENSE[message]).check(checkpoint())
    assert message in str(error.value)
    assert NAME in str(error.value)
    assert "\n" not in str(error.value)


def test_the_wrong_model_and_unknown_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="for another model"):
        Plan(source="0" * 64, layers={}).check(checkpoint())
    with pytest.raises(PlanError, match=r"a layer model\.layers\.9\.mlp that the model does not have"):
        Plan(source="f" * 64, layers={"model.layers.9.mlp": _blank()}).check(checkpoint())
    plan(_blank()).check(checkpoint())


GROUPED = {
    "keeps 3, 2, 2, 2 rows": [0, 1, 2, 4, 5, 8, 9, 12, 13],
    "one row per group is left": [0, 4, 8, 12],
    "1 groups are left, fewer than the 2": [0, 1, 2, 3],
}


@pytest.mark.parametrize("message", GROUPED)
def test_groups_must_stay_even(message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_layer(NAME, LayerPlan.keep(GROUPED[message], 16), top_k=2, groups=(4, 2))


def test_even_groups_and_whole_groups_are_fine() -> None:
    check_layer(NAME, LayerPlan.keep([0, 1, 4, 7, 8, 9, 14, 15], 16), top_k=2, groups=(4, 2))
    check_layer(NAME, LayerPlan.keep(range(8), 16), top_k=2, groups=(4, 2))
    with pytest.raises(PlanError, match="cannot hold the top-k of 5"):
        check_layer(NAME, LayerPlan.keep([0, 1, 4, 5, 8, 9], 16), top_k=5, groups=(4, 2))
    mixed = replace(LayerPlan.keep([0, 1, 4, 5], 16), rows=(((0, 1.0),), ((4, 1.0),), ((1, 1.0),), ((5, 1.0),)))
    with pytest.raises(PlanError, match="must stay together"):
        check_layer(NAME, mixed, top_k=2, groups=(4, 2))
    blend = replace(
        LayerPlan.keep([0, 1, 4, 5], 16), rows=(((0, 0.5), (4, 0.5)), ((1, 1.0),), ((5, 1.0),), ((6, 1.0),))
    )
    with pytest.raises(PlanError, match="blends rows of several groups"):
        check_layer(NAME, blend, top_k=2, groups=(4, 2))


EDITS = {
    "unknown key 'epxerts'; did you mean 'experts'": lambda f: f["layers"][NAME].update(epxerts=[]),
    "the key 'slots' is missing": lambda f: f["layers"][NAME].pop("slots"),
    "'rows' must be a list": lambda f: f["layers"][NAME].update(rows=3),
    "expected a whole number, found 1.5": lambda f: f["layers"][NAME]["slots"].__setitem__(0, 1.5),
    'expected an object such as {"from": 3}': lambda f: f["layers"][NAME]["experts"].__setitem__(0, 3),
    "expected a number, found": lambda f: f["layers"][NAME]["experts"].__setitem__(0, {"from": {"0": "half"}}),
    "the keys must be expert numbers": lambda f: f["layers"][NAME]["experts"].__setitem__(0, {"from": {"a": 0.5}}),
    "plan version 9": lambda f: f.update(version=9),
    "is no plan": lambda f: f.update(format="other"),
    "expected one of keep, drop": lambda f: f.update(extra="maybe"),
    "expected a list of specifications": lambda f: f.update(methods="reap"),
    "the key 'layers' is missing": lambda f: f.pop("layers"),
    "expected an object with the keys": lambda f: f["layers"].update({NAME: []}),
    "not in the safetensors beside the plan": lambda f: f["layers"][NAME]["experts"][0].update(reordered=True),
    "the coefficient of expert 0 is nan": lambda f: f["layers"][NAME]["experts"].__setitem__(
        0, {"from": {"0": math.nan}}
    ),
}


@pytest.mark.parametrize("message", EDITS)
def test_a_plan_edited_into_nonsense_is_refused(tmp_path, message: str) -> None:
    path = tmp_path / "plan.json"
    plan(LayerPlan.keep([0, 3, 5], 8)).save(path)
    found = json.loads(path.read_text())
    EDITS[message](found)
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_plan(tmp_path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        Plan.load(tmp_path / "bad.json")


@given(st.data())
def test_then_composes_as_matrices_do(data: st.DataObject) -> None:
    first = data.draw(layer_plans(bits=False))
    second = data.draw(layer_plans(num_experts=len(first.experts))) if len(first.experts) > 1 else None
    if second is None:
        return
    both = first.then(second)
    np.testing.assert_allclose(both.matrix(), second.matrix() @ first.matrix())
    assert [e.bits for e in both.experts] == [e.bits for e in second.experts]
    if first.plain_slots:
        np.testing.assert_allclose(both.router_matrix(), second.router_matrix() @ first.router_matrix())


def test_then_reorders_hidden_units_in_turn() -> None:
    turn, back = Permutation.of([2, 0, 1]), Permutation.of([1, 2, 0])
    once = LayerPlan.aliased([StoredExpert(((0, 1.0),), orders=(turn,))], [0])
    again = LayerPlan.aliased([StoredExpert(((0, 1.0),), orders=(back,))], [0])
    units = np.arange(3)
    both = once.then(again).experts[0].order(0)
    order = np.arange(3) if both is None else both.array()
    np.testing.assert_array_equal(units[order], units[turn.array()][back.array()])


def test_then_keeps_aliases_and_precision() -> None:
    merged = LayerPlan.aliased([StoredExpert(((0, 0.5), (1, 0.5))), StoredExpert(((2, 1.0),))], [0, 0, 1])
    quantised = merged.then(LayerPlan.identity(2).with_bits([8, 4]))
    assert quantised.slots == (0, 0, 1)
    assert [e.bits for e in quantised.experts] == [8, 4]
    pruned = merged.then(LayerPlan.keep([0], 2))
    assert pruned.rows == (((0, 1.0),), ((1, 1.0),))
    assert pruned.slots == (0, 0)
    with pytest.raises(PlanError, match="merge first, quantise last"):
        quantised.then(LayerPlan.aliased([StoredExpert(((0, 0.5), (1, 0.5)))], [0, 0]))
    with pytest.raises(PlanError, match="cannot be blended"):
        merged.then(replace(LayerPlan.keep([0], 2), rows=(((0, 0.5), (1, 0.5)),)))
    with pytest.raises(PlanError, match="the second plan is for 5 experts but the first leaves 2"):
        merged.then(LayerPlan.identity(5))
    assert LayerPlan.identity(3).with_bits(8).then(LayerPlan.keep([1, 2], 3)).experts[0].bits == 8


def test_plans_compose_layer_by_layer() -> None:
    first = plan(LayerPlan.keep([0, 2, 5], 8), methods=("reap:keep=3",))
    second = plan(LayerPlan.identity(3).with_bits(8), methods=("rtn:bits=8",), extra="drop")
    both = first.then(second)
    assert both.methods == ("reap:keep=3", "rtn:bits=8")
    assert both.extra == "drop"
    assert both.layers[NAME].dropped == (1, 3, 4, 6, 7)
    assert {e.bits for e in both.layers[NAME].experts} == {8}
    assert plan(LayerPlan.identity(4, why="nothing")).untouched
    assert not both.untouched
