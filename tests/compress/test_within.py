"""A method fitted to a number of bytes."""

from __future__ import annotations

import pytest

from moekit.checkpoint import Checkpoint
from moekit.compress import chain, within
from moekit.errors import OptionError, PlanError
from moekit.plan import make_plan
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
