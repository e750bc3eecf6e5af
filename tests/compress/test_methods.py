"""Every method, by what all of them owe, and each by the one thing its paper says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moekit.compress import method, methods, sequence
from moekit.errors import OptionError, PlanError, ProfileError
from moekit.plan import Plan, make_plan
from moekit.plan.planner import Site

PRUNING = ("random", "frequency", "router-probability", "reap", "easy-ep")
NAME = "model.layers.0.mlp"


def kept(plan: Plan, layer: str = NAME) -> list[int]:
    return sorted(plan.layers[layer].sources)


def cost(plan: Plan) -> float:
    """Something to measure, for methods that search."""
    return float(sum(layer.matrix()[:, :3].sum() for layer in plan.layers.values())) / 99


def test_the_first_methods_are_there() -> None:
    assert {*PRUNING, "m-smoe", "rtn"} <= set(methods())


WITHOUT_WEIGHTS_AROUND = {"eaquant": "eaquant:smooth=none,router_bits=16"}
"""What a method is asked to do to a source that has experts only, where it usually does more."""


@pytest.mark.parametrize("name", methods())
def test_what_every_method_owes(name: str, model, profile, tmp_path) -> None:
    planner = method(WITHOUT_WEIGHTS_AROUND.get(name, name))
    assert method(planner.spec) == planner
    weights = {n: bank.gate_up.clone() for n, bank in model.banks.items()}
    first, second = planner.plan(profile, model, cost), planner.plan(profile, model, cost)
    assert first == second
    assert first.methods == (planner.spec,)
    assert set(first.layers) == set(model.banks)
    assert all(layer.why for layer in first.layers.values())
    assert all(torch.equal(model.banks[n].gate_up, before) for n, before in weights.items())
    first.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == first
    if planner.needs:
        with pytest.raises(ProfileError, match=f"{name} needs a profile"):
            planner.plan(None, model, cost)
        with pytest.raises(ProfileError, match="is of another model"):
            planner.plan(replace(profile, source="0" * 64), model, cost)
        with pytest.raises(ProfileError, match=f"nothing on layer {NAME}"):
            planner.plan(replace(profile, layers={}), model, cost)
        bare = {n: replace(layer, arrays={"tokens": np.zeros((1, 2, 1))}) for n, layer in profile.layers.items()}
        with pytest.raises(ProfileError, match="profile again with this statistic"):
            planner.plan(replace(profile, layers=bare), model, cost)
    else:
        assert planner.plan(None, model, cost) == first


@pytest.mark.parametrize("name", PRUNING)
def test_pruning_keeps_what_is_asked(name: str, model, profile) -> None:
    for option, count in (("0.5", 4), ("3", 3), ("1.0", 8), ("0.3", 3)):
        plan = method(f"{name}:keep={option}").plan(profile, model)
        assert all(len(layer.experts) == count and layer.plain_slots for layer in plan.layers.values())


@pytest.mark.parametrize("name", PRUNING)
def test_pruning_keeps_groups_even(name: str, model, profile, observe) -> None:
    model.sites = [Site(NAME, 16, 2, groups=(4, 2))]
    profile = replace(profile, layers={NAME: observe(experts=16)})
    plan = method(f"{name}:keep=0.4").plan(profile, model)
    assert [sum(e // 4 == g for e in kept(plan)) for g in range(4)] == [2, 2, 2, 2]
    with pytest.raises(PlanError, match="one row per group is left"):
        method(f"{name}:keep=4").plan(profile, model)


@pytest.mark.parametrize("name", [*PRUNING, "m-smoe"])
def test_impossible_counts_are_refused(name: str, model, profile) -> None:
    for bad in ("0", "-1", "0.0", "1.5", "nan"):
        with pytest.raises(OptionError, match=f"keep={bad}"):
            method(f"{name}:keep={bad}")
    with pytest.raises(PlanError, match="it has only 8 experts"):
        method(f"{name}:keep=9").plan(profile, model)
    with pytest.raises(PlanError, match="fewer than the top-k of 2"):
        method(f"{name}:keep=1").plan(profile, model)


def test_prediction_layers_are_dropped_once_counts_change(model, profile) -> None:
    model.sites.append(Site("model.layers.2.mlp", 8, 2, extra=True))
    assert method("reap").plan(profile, model).extra == "drop"
    assert method("rtn").plan(None, model).extra == "keep"
    assert "model.layers.2.mlp" not in method("random").plan(None, model).layers


def test_random_differs_by_seed_and_layer(model) -> None:
    plans = [method(f"random:keep=4,seed={seed}").plan(None, model) for seed in range(8)]
    assert len({tuple(kept(plan)) for plan in plans}) > 1
    assert any(kept(plan) != kept(plan, "model.layers.1.mlp") for plan in plans)


def test_each_score_ranks_by_its_own_statistic(model, profile) -> None:
    layer = profile.layers[NAME]
    total = {name: layer.total(name) for name in ("counts", "gate_norm", "probability")}
    for name in ("counts", "gate_norm"):
        layer.arrays[name][..., 3] = total[name][3] = 0
    mean = np.divide(total["gate_norm"], total["counts"], out=np.zeros(8), where=total["counts"] > 0)
    for name, score in (
        ("frequency", total["counts"]),
        ("router-probability", total["probability"]),
        ("reap", mean),
    ):
        expected = sorted(np.argsort(-score, kind="stable")[:4].tolist())
        assert kept(method(f"{name}:keep=4").plan(profile, model)) == expected
        code = method(f"{name}:keep=4,domains=code").plan(profile, model)
        assert code.methods[0].endswith("domains=code")


def test_reap_and_frequency_disagree_where_gate_and_output_do(model, profile) -> None:
    layer = profile.layers[NAME]
    layer.counts[:] = [100, 100, 100, 100, 1, 1, 1, 1]
    layer.gate_norm[:] = [1, 1, 1, 1, 1, 1, 1, 1]
    assert kept(method("frequency:keep=4").plan(profile, model)) == [0, 1, 2, 3]
    assert kept(method("reap:keep=4").plan(profile, model)) == [4, 5, 6, 7]


def test_easy_ep_balances_domains(model, profile) -> None:
    layer = profile.layers[NAME]
    layer.contribution[:, 0] = [400, 300, 200, 100, 0, 0, 0, 0]
    layer.contribution[:, 1] = [0, 0, 0, 0, 0.4, 0.3, 0.2, 0.1]
    assert kept(method("easy-ep:keep=4").plan(profile, model)) == [0, 1, 4, 5]
    assert kept(method("easy-ep:keep=4,domains=prose").plan(profile, model)) == [4, 5, 6, 7][:4]
    assert kept(method("easy-ep:keep=4,domains=code").plan(profile, model)) == [0, 1, 2, 3]


def test_rtn_only_changes_precision(model) -> None:
    layer = method("rtn:bits=4,group_size=32").plan(None, model).layers[NAME]
    assert {(e.bits, e.group_size, e.plain) for e in layer.experts} == {(4, 32, True)}
    assert layer.plain_slots
    assert layer.dropped == ()
    with pytest.raises(OptionError, match="5 is a precision no format has"):
        method("rtn:bits=5")
    with pytest.raises(OptionError, match="group_size=0 must be positive"):
        method("rtn:group_size=0")


def test_methods_in_sequence_see_what_the_ones_before_left(model, profile) -> None:
    both = make_plan(sequence(["frequency:keep=6", "reap:keep=3", "rtn:bits=4"]), model, profile)
    first = kept(method("frequency:keep=6").plan(profile, model))
    mean = profile.layers[NAME].total("gate_norm")[first] / profile.layers[NAME].total("counts")[first]
    assert kept(both) == sorted(np.array(first)[np.argsort(-mean)[:3]].tolist())
    assert {e.bits for e in both.layers[NAME].experts} == {4}
    assert both.methods == ("frequency:keep=6", "reap:keep=3", "rtn:bits=4,group_size=64")
    assert both.profile == profile.fingerprint
    with pytest.raises(PlanError, match="has only 3 experts"):
        make_plan(sequence(["frequency:keep=3", "reap:keep=4"]), model, profile)


def test_pruning_after_merging_works_on_the_merged(model, profile) -> None:
    merged = make_plan(sequence(["m-smoe:keep=5"]), model, profile).layers[NAME]
    both = make_plan(sequence(["m-smoe:keep=5", "frequency:keep=2"]), model, profile).layers[NAME]
    assert len(both.experts) == 2
    assert all(expert in merged.experts for expert in both.experts)
    rows = [row for row, slot in zip(merged.rows, merged.slots, strict=True) if merged.experts[slot] in both.experts]
    assert list(both.rows) == rows


WRONG = {
    "reapp": "unknown method 'reapp'; did you mean 'reap'",
    "zzz": "unknown method 'zzz'; choose one of",
    "reap:kep=0.5": "reap has no option 'kep'; did you mean 'keep'",
    "reap:keep": "reap: expected key=value, found 'keep'",
    "reap:keep=": "reap: expected key=value",
    "reap:keep=half": "reap: keep=half is not a whole number or a number",
    "reap:keep=1,keep=2": "the option 'keep' is given twice",
    "rtn:bits=4.5": "rtn: bits=4.5 is not a whole number",
    "m-smoe:aligned=maybe": "m-smoe: aligned=maybe is not true or false",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_specifications_get_one_clear_line(spec: str) -> None:
    with pytest.raises(OptionError) as error:
        method(spec)
    assert WRONG[spec] in str(error.value)
    assert "\n" not in str(error.value)
