"""A dense layer cut in slices, and balance in terms of information."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import lives, tiny

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn.experts import FeedForward
from moekit.nn.information import Concentration, MutualInformation
from moekit.nn.layer import MoE
from moekit.nn.parts import Site
from moekit.nn.router import Router
from moekit.nn.seen import Seen
from moekit.nn.slices import cut, joined
from moekit.train.recipe import Recipe

ALL = {"weigh": "ones", "select": {"kind": "top-k", "k": 4}}


@given(st.integers(1, 4).flatmap(lambda units: st.tuples(st.just(units * 4), st.sampled_from([1, 2, 4]))))
def test_all_slices_together_are_the_dense_layer(sizes: tuple[int, int]) -> None:
    units, slices = sizes
    whole = FeedForward(6, units, "gelu")
    site = Site(hidden_size=6, intermediate_size=units // slices, num_experts=slices, top_k=slices)
    layer = MoE(Router(site, {"weigh": "ones"}), cut(whole, slices))
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), whole(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined(cut(whole, slices))(x), whole(x))


def test_slices_that_do_not_divide() -> None:
    with pytest.raises(OptionError, match="10 hidden units cannot be cut in 4 equal slices"):
        cut(FeedForward(6, 10), 4)


def test_slices_live_in_a_model(tmp_path) -> None:
    router = {"select": {"kind": "expert-choice", "share": 0.5}, "weigh": {"kind": "scores", "normalise": False}}
    lives(tmp_path, router=router, balance={"mutual-information": 0.01, "concentration": 0.01})


def told(logits: torch.Tensor, padding: torch.Tensor | None = None) -> Seen:
    routing = Routing(logits.argmax(1, keepdim=True), torch.ones(len(logits), 1), logits)
    return Seen(torch.zeros(len(logits), 3), routing, None, None, Context(padding=padding))


def test_information_at_its_ends() -> None:
    site = Site(hidden_size=3, intermediate_size=2, num_experts=4)
    inform, concentrate = MutualInformation(site), Concentration(site)
    alike, sure = torch.zeros(8, 4), 100 * torch.eye(4).repeat(2, 1)
    torch.testing.assert_close(inform(told(alike)), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(inform(told(sure)), torch.tensor(-math.log(4)))
    torch.testing.assert_close(concentrate(told(sure)), torch.tensor(math.log(4)))
    torch.testing.assert_close(concentrate(told(sure[:1].repeat(5, 1))), torch.tensor(0.0), atol=1e-6, rtol=0)
    padding = torch.tensor([False] + [True] * 7)
    torch.testing.assert_close(concentrate(told(sure, padding)), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_information_has_the_sign_that_training_needs() -> None:
    logits = torch.randn(16, 4, requires_grad=True)
    term = MutualInformation(Site(hidden_size=3, intermediate_size=2, num_experts=4))
    before = term(told(logits))
    before.backward()
    after = term(told(logits.detach() - 0.5 * logits.grad))
    assert -math.log(4) <= after.item() < before.item() <= 0


def test_a_choice_that_is_barred_leaves_gradients_finite() -> None:
    logits = torch.randn(6, 4).index_fill(1, torch.tensor([2]), -math.inf).requires_grad_()
    MutualInformation(Site(hidden_size=3, intermediate_size=2, num_experts=4))(told(logits)).backward()
    assert logits.grad.isfinite().all()


def test_experts_of_other_kinds_and_widths(tmp_path) -> None:
    model = lives(tmp_path, others=[{"kind": "wide", "width": 24}, {"kind": "gru", "width": 6}], num_experts_per_tok=3)
    assert model.config.site(0).choices == 6


def test_a_recurrent_expert_reads_its_own_tokens_in_order() -> None:
    layer = tiny(others=[{"kind": "gru", "width": 6}]).model.layers[0].mlp.others[0]
    x = torch.randn(9, 32)
    together = layer(x, torch.tensor([0, 0, 0, 2, 2, 2, 2, 5, 5]))
    for start, end in ((0, 3), (3, 7), (7, 9)):
        torch.testing.assert_close(together[start:end], layer(x[start:end]))
    assert layer(x[:0], torch.zeros(0)) is None
    assert not torch.allclose(layer(x)[1], layer(x[1:])[0])


@pytest.mark.parametrize("router", [None, {"granularity": {"kind": "sequence", "pool": "prefix"}}])
def test_padding_leaves_no_trace_in_what_is_read_in_order(router) -> None:
    model = tiny(others=[{"kind": "gru", "width": 6}], router=router)
    ids = torch.randint(0, 40, (1, 6), generator=torch.Generator().manual_seed(1))
    padded, mask = torch.cat((torch.full((1, 3), 7), ids), dim=1), torch.tensor([[0] * 3 + [1] * 6])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(padded, attention_mask=mask, position_ids=places)
        torch.testing.assert_close(out.logits[:, 3:], model(ids).logits, rtol=1e-4, atol=1e-4)
        assert any(int(load[-1]) > 3 for load in out.expert_load)  # it was chosen by tokens too


def test_the_two_kinds_of_expert_in_the_hecto_recipe_are_of_one_size() -> None:
    layer = Recipe.read("hecto").build().model.layers[0].mlp
    stacked, recurrent = (sum(p.numel() for p in part.parameters()) for part in (layer.experts, layer.others[0]))
    assert recurrent == pytest.approx(stacked, rel=0.01)


@pytest.mark.parametrize(("kind", "told"), [("wide", "an expert"), ("gru", "a recurrent expert")])
def test_width_of_an_expert(kind: str, told: str) -> None:
    with pytest.raises(OptionError, match=f"^{told} of width 0: give 1 or more$"):
        tiny(others=[{"kind": kind, "width": 0}])
