"""The Tsallis entropy as a balance term: its ends, its limit, its sign."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import lives

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn import Router, Seen, Site
from moekit.nn.balance import balance_term
from moekit.nn.information import Tsallis, entropy, tsallis

E = 5
SITE = Site(hidden_size=3, intermediate_size=2, num_experts=E)
ORDERS = st.floats(0.2, 4.0)


def told(logits, padding=None, pool=None):
    router = Router(SITE)
    router.pool = pool
    routing = Routing(logits.argmax(1, keepdim=True), torch.ones(len(logits), 1), logits)
    return Seen(torch.zeros(len(logits), 3), routing, router, None, Context(padding=padding))


@given(q=ORDERS.filter(lambda q: abs(q - 1) > 0.05), seed=st.integers(0, 9))
def test_it_is_the_formula(q, seed):
    p = torch.randn(7, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(tsallis(p, q), (1 - p.pow(q).sum(-1)) / (q - 1))


@pytest.mark.parametrize("q", [1.0, 1 - 1e-6, 1 + 1e-6, 1 + 1e-12])
def test_near_one_it_is_shannons(q):
    p = torch.randn(7, E).softmax(-1)
    torch.testing.assert_close(tsallis(p, q), entropy(p), rtol=1e-5, atol=1e-5)


@given(q=ORDERS | st.just(1.0))
def test_0_where_tokens_are_sure_and_1_where_they_are_not(q):
    term = Tsallis(SITE, q=q)
    assert float(term(told(200 * torch.eye(E)))) == pytest.approx(0, abs=1e-5)
    assert float(term(told(torch.zeros(3, E)))) == pytest.approx(1, abs=1e-5)


def test_it_rises_with_the_temperature():
    logits, term = torch.randn(6, E), Tsallis(SITE)
    values = [float(term(told(logits / temperature))) for temperature in (0.1, 0.5, 1.0, 2.0, 9.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_minimising_it_sharpens_and_barred_choices_leave_gradients_finite(q):
    logits = torch.randn(6, E).index_fill(1, torch.tensor([2]), -math.inf).requires_grad_()
    pool = torch.arange(E) != 2
    before = Tsallis(SITE, q=q)(told(logits, pool=pool))
    before.backward()
    assert logits.grad.isfinite().all()
    assert Tsallis(SITE, q=q)(told(logits.detach() - 0.5 * logits.grad, pool=pool)) < before


def test_padding_and_choices_outside_the_pool_do_not_count():
    padding = torch.tensor([False, True, True])
    mixed = torch.cat((torch.zeros(1, E), 200 * torch.eye(E)[:2]))
    assert float(Tsallis(SITE)(told(mixed, padding))) == pytest.approx(1, abs=1e-5)
    pool = torch.tensor([True, True, False, False, False])
    assert float(Tsallis(SITE)(told(torch.zeros(2, E).masked_fill(~pool, -math.inf), pool=pool))) == pytest.approx(1)
    alone = torch.arange(E) == 3
    assert float(Tsallis(SITE)(told(torch.zeros(2, E).masked_fill(~alone, -math.inf), pool=alone))) == 0


def test_in_a_model(tmp_path):
    lives(tmp_path, balance={"tsallis": {"weight": 0.01, "q": 1.1}})


@pytest.mark.parametrize("q", [0.0, -1.0])
def test_orders_that_cannot_be(q):
    with pytest.raises(OptionError, match=rf"q={q} of a Tsallis entropy must be positive"):
        balance_term("tsallis", {"weight": 0.1, "q": q}, SITE)
