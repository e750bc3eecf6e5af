"""A method fitted to a number of bytes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.checkpoint import Checkpoint
from moekit.compress import chain, method, within
from moekit.errors import OptionError, PlanError
from moekit.plan import Plan, make_plan
from moekit.plan.sizes import plan_nbytes, source_nbytes


@pytest.fixture(scope="module")
def mini() -> Checkpoint:
    return Checkpoint.open("moekit:mini")


@pytest.mark.parametrize(
    ("spec", "share", "found"),
    [
        ("random:seed=1", 0.6, "random:seed=1,keep={}"),
        ("rtn", 0.4, "rtn:bits={}"),
        ("random:seed=1/rtn:bits=4", 0.35, "random:seed=1,keep={}/rtn:bits=4"),
        ("rtn:bits=8/random", 0.35, "rtn:bits=8/random:keep={}"),
    ],
)
def test_the_largest_that_fits(mini: Checkpoint, spec: str, share: float, found: str) -> None:
    budget = int(share * source_nbytes(mini))
    every = {}
    for value in (*range(2, 16),):
        try:
            plan = make_plan(chain(found.format(value)), mini)
        except (OptionError, PlanError):
            continue
        every[value] = plan_nbytes(plan, mini)
    best = max(value for value, size in every.items() if size <= budget)
    named, plan = within(spec, mini, None, budget) or ("", None)
    assert named == found.format(best)
    assert plan is not None
    assert plan_nbytes(plan, mini) == every[best]


def test_nothing_left_open_fits_or_does_not(mini: Checkpoint) -> None:
    whole = source_nbytes(mini)
    assert (within("rtn:bits=4", mini, None, whole) or ("",))[0] == "rtn:bits=4"
    assert within("rtn:bits=4", mini, None, whole // 8) is None
    assert within("rtn", mini, None, whole // 100) is None


def test_an_unknown_method_of_a_chain(mini: Checkpoint) -> None:
    with pytest.raises(OptionError, match=r"unknown method 'rntn'; .*'rtn'"):
        within("random/rntn:bits=4", mini, None, 1)


def test_a_search_is_sized_without_searching_and_runs_once(mini: Checkpoint) -> None:
    measured: list[Plan] = []

    def evaluate(plan: Plan) -> float:
        measured.append(plan)
        return float(len(measured))

    budget = source_nbytes(mini) // 2
    spec = "eep:evaluations=5"
    named, plan = within(spec, mini, None, budget, evaluate) or ("", None)
    assert len(measured) == 5
    assert plan is not None
    assert named == "eep:evaluations=5,keep=6"
    assert [layer.rows for layer in plan.layers.values()] == [layer.rows for layer in measured[0].layers.values()]
    assert plan_nbytes(plan, mini) <= budget
    larger = method("eep:evaluations=5,keep=7").draft(None, mini)  # type: ignore[attr-defined]
    assert plan_nbytes(larger, mini) > budget
    assert within(spec, mini, None, budget // 10, evaluate) is None
    assert len(measured) == 5


@given(keep=st.integers(4, 15), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_a_draft_is_as_large_as_what_the_search_finds(mini: Checkpoint, keep: int, seed: int) -> None:
    eep = method(f"eep:keep={keep},evaluations=6,discrete=2,initial=1,seed={seed}")
    plan = eep.plan(None, mini, lambda plan: float(plan.fingerprint[0] < "8"))
    assert plan_nbytes(eep.draft(None, mini), mini) == plan_nbytes(plan, mini)  # type: ignore[attr-defined]


def test_a_setting_that_cannot_be_had_is_passed_over(mini: Checkpoint) -> None:
    tried: list[str] = []

    def make(spec: str) -> Plan:
        tried.append(spec)
        if spec == "rtn:bits=1":
            raise OptionError("no such width")
        return make_plan(chain(spec), mini)

    assert (within("rtn", mini, None, source_nbytes(mini) // 2, make=make) or ("",))[0] == "rtn:bits=4"
    assert (
        within("gptq", mini, None, 100, make=lambda spec: make(spec.replace("gptq", "rtn").replace("=1", "=2"))) is None
    )
    assert len(tried) <= 5


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("super-experts:planner=reap", "super-experts:planner=reap:keep=6"),
        (
            "super-experts:planner=random:seed=1,depth=0.5/rtn:bits=8",
            "super-experts:planner=random:seed=1;keep=6,depth=0.5/rtn:bits=8",
        ),
    ],
)
def test_the_size_of_a_method_inside_another(mini: Checkpoint, spec: str, found: str) -> None:
    def make(spec: str) -> Plan:
        keep = re.search(r"keep=(\d+)", spec)
        assert keep is not None
        return make_plan(chain(f"random:keep={keep[1]}"), mini)

    assert (within(spec, mini, None, source_nbytes(mini) // 2, make=make) or ("",))[0] == found
