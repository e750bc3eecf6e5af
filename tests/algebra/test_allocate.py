"""The allocation solver equals brute force, keeps budgets to the byte, and gives the whole curve."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from moekit.algebra import allocate

menus = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def totals(menus):
    for pick in itertools.product(*(range(len(menu)) for menu in menus)):
        chosen = [menu[i] for menu, i in zip(menus, pick, strict=True)]
        yield sum(c[0] for c in chosen), sum(c[1] for c in chosen)


@given(menus, st.integers(0, 200))
def test_equals_brute_force(menus, budget) -> None:
    fits = [total for total in totals(menus) if total[0] <= budget]
    found = allocate(menus, budget)
    if not fits:
        assert found is None
        return
    assert found.loss == min(loss for _, loss in fits)
    assert found.nbytes == min(nbytes for nbytes, loss in fits if loss == found.loss)
    chosen = [menu[i] for menu, i in zip(menus, found.choice, strict=True)]
    assert sum(c[0] for c in chosen) == found.nbytes
    assert sum(c[1] for c in chosen) == found.loss
    assert found.exact


@given(menus)
def test_the_curve_is_the_pareto_front(menus) -> None:
    every = set(totals(menus))
    front = {a for a in every if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in every)}
    found = allocate(menus, 10**9)
    assert set(found.curve) == front
    assert list(found.curve) == sorted(front)


def test_thinning_keeps_the_budget_and_owns_up() -> None:
    draw = random.Random(0)
    wide = [[(draw.randrange(10**6), draw.random()) for _ in range(6)] for _ in range(12)]
    exact, thin = allocate(wide, 4 * 10**6), allocate(wide, 4 * 10**6, limit=20)
    assert exact.exact
    assert not thin.exact
    assert thin.nbytes <= 4 * 10**6
    assert exact.loss <= thin.loss <= exact.loss * 1.25
    assert len(thin.curve) <= 20


def test_no_items_cost_nothing() -> None:
    assert allocate([], 0).choice == ()
