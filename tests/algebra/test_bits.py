"""The allocation of widths equals brute force, with and without demands, and says what would fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.algebra import allocate_bits
from moekit.errors import BudgetError, OptionError


def brute_force(loss_EB, widths, budget, demands, spend):
    """(bits used, least loss) of the best choice, or None."""
    fits = []
    for pick in itertools.product(range(len(widths)), repeat=len(loss_EB)):
        bits = [widths[b] for b in pick]
        if sum(bits) <= budget and all(bits.count(w) >= n for w, n in demands.items()):
            fits.append((sum(bits), sum(row[b] for row, b in zip(loss_EB, pick, strict=True))))
    if not fits:
        return None
    most = max(used for used, _ in fits)
    return min(((u, loss) for u, loss in fits if u == most or not spend), key=lambda one: one[1])


def outcome(loss_EB, widths, chosen):
    return sum(chosen), sum(row[widths.index(w)] for row, w in zip(loss_EB, chosen, strict=True))


demands = st.dictionaries(st.sampled_from([1, 2, 3]), st.integers(0, 3), max_size=3)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(4, 20), demands, st.booleans(), st.permutations([1, 2, 3]))
def test_six_experts_and_three_widths_equal_brute_force(seed, budget, demand, spend, widths) -> None:
    loss_EB = np.random.default_rng(seed).uniform(size=(6, 3))
    expected = brute_force(loss_EB, widths, budget, demand, spend)
    if sum(demand.values()) > 6:
        with pytest.raises(OptionError, match="there are only 6"):
            allocate_bits(loss_EB, widths, budget, at_least=demand, spend=spend)
        return
    if expected is None:
        with pytest.raises(BudgetError, match="bits do not suffice for 6 experts"):
            allocate_bits(loss_EB, widths, budget, at_least=demand, spend=spend)
        return
    found = allocate_bits(loss_EB, widths, budget, at_least=demand, spend=spend)
    used, loss = outcome(loss_EB, widths, found)
    assert loss == pytest.approx(expected[1])
    assert used <= budget
    assert not spend or used == expected[0]
    assert all(found.count(width) >= number for width, number in demand.items())


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 40), st.booleans())
def test_widths_with_gaps(seed: int, budget: int, spend: bool) -> None:
    widths = [2, 8, 3]
    loss_EB = np.random.default_rng(seed).uniform(size=(4, 3))
    expected = brute_force(loss_EB, widths, budget, {8: 1}, spend)
    if expected is None:
        with pytest.raises(BudgetError):
            allocate_bits(loss_EB, widths, budget, at_least={8: 1}, spend=spend)
    else:
        found = outcome(loss_EB, widths, allocate_bits(loss_EB, widths, budget, at_least={8: 1}, spend=spend))
        assert found[1] == pytest.approx(expected[1])
        assert not spend or found[0] == expected[0]


def test_the_named_smallest_budget_fits() -> None:
    loss_EB = np.ones((6, 3))
    with pytest.raises(BudgetError, match=r"at least 2 at 3 bits: the smallest budget is 10 bits"):
        allocate_bits(loss_EB, [1, 2, 3], 9, at_least={3: 2})
    assert sorted(allocate_bits(loss_EB, [1, 2, 3], 10, at_least={3: 2})) == [1, 1, 1, 1, 3, 3]
    with pytest.raises(BudgetError, match="the smallest budget is 6 bits"):
        allocate_bits(loss_EB, [1, 2, 3], -1)


def test_bits_go_where_they_help() -> None:
    loss_EB = np.array([[9.0, 1.0, 0.0], [2.5, 1.0, 0.9], [90.0, 10.0, 1.0], [0.1, 0.1, 0.1]])
    assert allocate_bits(loss_EB, [1, 2, 3], 8) == (2, 2, 3, 1)


def test_unspent_bits_only_if_wanted() -> None:
    loss_EB = np.array([[0.0, 1.0], [0.0, 2.0]])
    assert allocate_bits(loss_EB, [2, 4], 100) == (4, 4)
    assert allocate_bits(loss_EB, [2, 4], 7) == (4, 2)
    assert allocate_bits(loss_EB, [2, 4], 7, spend=False) == (2, 2)


def test_no_experts_need_no_bits() -> None:
    assert allocate_bits(np.zeros((0, 2)), [2, 4], 0) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((3, 2)), [1, 2, 3], 9), r"a column for each of the widths \[1, 2, 3\], got shape \[3, 2\]"),
        ((np.full((3, 1), np.nan), [1], 9), "losses hold NaN"),
        ((np.ones((3, 2)), [2, 2], 9), r"widths \[2, 2\] must be different"),
        ((np.ones((3, 2)), [2, 3], 9, {4: 1}), r"at least 1 experts at 4 bits: the widths are \[2, 3\]"),
    ],
)
def test_bad_input_is_refused(arguments, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        allocate_bits(*arguments[:3], at_least=arguments[3] if len(arguments) > 3 else None)
