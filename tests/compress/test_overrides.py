"""Other options for some layers: typed, planned, written down and read back."""

from __future__ import annotations

import pytest

from moekit.compress import method, sequence
from moekit.errors import OptionError
from moekit.plan import Plan, make_plan
from moekit.plan.overrides import Overridden, matches
from moekit.plan.planner import sites_of


@pytest.fixture
def names(model) -> list[str]:
    return [site.name for site in sites_of(model) if not site.extra]


def test_layers_that_match_get_the_other_options(model, profile, names) -> None:
    (planner,) = sequence(["reap:keep=0.5", f"reap@{names[0]}:keep=0.75"])
    plan = make_plan([planner], model, profile)
    half, more = (method(f"reap:keep={keep}").plan(profile, model) for keep in (0.5, 0.75))
    assert plan.layers[names[0]] == more.layers[names[0]]
    for name in names[1:]:
        assert plan.layers[name] == half.layers[name]
    assert list(plan.layers) == names


@pytest.mark.parametrize("name", ["random", "frequency", "router-probability", "reap", "easy-ep", "m-smoe", "rtn"])
def test_the_same_options_everywhere_are_the_method_itself(name, model, profile) -> None:
    (planner,) = sequence([f"{name}@*"])
    assert planner.plan(profile, model).layers == method(name).plan(profile, model).layers


def test_options_that_are_not_named_are_the_base_s(model, profile, names) -> None:
    (planner,) = sequence(["rtn:bits=8,group_size=32", f"rtn@{names[-1]}:bits=4"])
    plan = planner.plan(None, model)
    assert {(e.bits, e.group_size) for e in plan.layers[names[-1]].experts} == {(4, 32)}
    assert {(e.bits, e.group_size) for e in plan.layers[names[0]].experts} == {(8, 32)}
    assert not planner.needs


def test_the_last_pattern_that_matches_wins(model, names) -> None:
    (planner,) = sequence(["rtn:bits=8", "rtn@*:bits=4", f"rtn@{names[0]}:bits=2"])
    bits = {name: layer.experts[0].bits for name, layer in planner.plan(None, model).layers.items()}
    assert bits == {name: 2 if name == names[0] else 4 for name in names}


def test_without_a_base_the_other_layers_stay(model, names) -> None:
    planners = sequence([f"rtn@{names[0]}:bits=4", "rtn:bits=8"])
    assert len(planners) == 2
    alone = planners[0].plan(None, model)
    assert list(alone.layers) == [names[0]]
    both = make_plan(planners, model)
    assert {layer.experts[0].bits for layer in both.layers.values()} == {8}


def test_what_is_written_down_makes_the_same_plan(model, profile, names, tmp_path) -> None:
    specs = ["reap:keep=0.5", f"reap@{names[0]}:keep=6", "rtn:bits=8", f"rtn@{names[-1]}:group_size=32"]
    plan = make_plan(sequence(specs), model, profile)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read.methods[1].startswith(f"reap@{names[0]}:keep=6")
    assert len(read.methods) == 4
    assert make_plan(sequence(read.methods), model, profile) == read == plan


def test_an_override_follows_its_method_past_others(names) -> None:
    planners = sequence(["rtn:bits=8", "reap:keep=0.5", f"rtn@{names[0]}:bits=4"])
    assert isinstance(planners[0], Overridden)
    assert planners[1] == method("reap:keep=0.5")
    assert planners[0].spec == f"rtn:bits=8,group_size=64 rtn@{names[0]}:bits=4,group_size=64"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "rtn@model.layers.99.mlp:bits=4",
            r"rtn@model.layers.99.mlp matches no MoE layer; did you mean 'model\.layers",
        ),
        ("rtn@:bits=4", "expected a layer's name or a pattern after @"),
        ("rnt@model.*:bits=4", "unknown method 'rnt'; did you mean 'rtn'"),
        ("rtn@model.*:bit=4", "rtn has no option 'bit'; did you mean 'bits'"),
        ("rtn@model.*:bits", "expected key=value, found 'bits'"),
    ],
)
def test_mistakes_name_the_nearest(spec, message, model) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(sequence(["rtn:bits=8", spec]), model)


def test_patterns() -> None:
    name = "model.layers.12.mlp"
    assert all(matches(name, p) for p in ("model.layers.12", "model.layers.1[0-3].*", "*.12.*", "*", name))
    assert not any(matches(name, p) for p in ("model.layers.1", "model.layers.[0-3].*", "layers.12", ""))
