"""Routers put together from parts: equal to stock routing where stock has it, and right at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.contract import PAD, Context
from moekit.errors import OptionError
from moekit.nn import Router, Site

SITE = Site(hidden_size=6, intermediate_size=4, num_experts=8, top_k=3)
AS_THEY_ARE = {"kind": "scores", "normalise": False}


def router(site=SITE, **parts):
    torch.manual_seed(0)
    made = Router(site, parts)
    for module in made.modules():
        if hasattr(module, "initialise"):
            module.initialise(1.0)
    return made


def route(made, x):
    return made.routing(made(x))


def test_the_plain_router_is_softmax_then_top_k_then_a_sum_of_one():
    made, x = router(), torch.randn(10, 6)
    found = route(made, x)
    scores = (x @ made.scorer.weight.T).softmax(-1)
    weight, expert = scores.topk(3)
    assert torch.equal(found.expert, expert)
    assert torch.allclose(found.weight, weight / weight.sum(-1, keepdim=True))


def test_a_selection_bias_moves_the_choice_and_not_the_weights():
    made, x = router(activation="sigmoid", weigh=AS_THEY_ARE), torch.randn(10, 6)
    made.register_buffer("bias", torch.zeros(8))
    made.bias[5] = 10.0
    found = route(made, x)
    assert (found.expert[:, 0] == 5).all()
    scores = (x @ made.scorer.weight.T).sigmoid()
    assert torch.allclose(found.weight, scores.gather(1, found.expert))


@given(size=st.sampled_from([0.5, 5.0, 60.0]), seed=st.integers(0, 99))
def test_stick_breaking_gives_each_expert_its_share_of_what_is_left(size, seed):
    made = router(activation="stick-breaking", weigh=AS_THEY_ARE)
    x = size * torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
    logits = x @ made.scorer.weight.detach().T
    share, slack = logits.double().sigmoid(), 1e-6 * float(logits.abs().max().clamp(min=1))  # of a float32's exponent
    left, scores = torch.ones(9, dtype=torch.double), []
    for own in share.unbind(1):
        scores.append(own * left)
        left = left * (1 - own)
    weight = torch.stack(scores, 1).topk(3).values
    found = route(made, x)
    assert torch.allclose(found.weight.double(), weight, atol=slack)
    assert torch.allclose(torch.stack(scores, 1).gather(1, found.expert), weight, atol=slack)
    assert (found.weight.sum(1) <= 1 + slack).all()


def test_stick_breaking_passes_over_those_outside_the_pool():
    made, x = router(activation="stick-breaking", weigh=AS_THEY_ARE), torch.randn(20, 6)
    made.pool = torch.tensor([False, True] * 4)
    own = (x @ made.scorer.weight.T).sigmoid()[:, 1::2]
    expected = own * torch.cat((torch.ones(20, 1), (1 - own).cumprod(1)[:, :-1]), 1)
    assert torch.allclose(route(made, x).weight, expected.topk(3).values, atol=1e-6)


def test_a_pool_leaves_the_others_without_probability():
    made, x = router(), torch.randn(20, 6)
    made.pool = torch.tensor([True, False] * 4)
    found = route(made, x)
    assert set(found.expert.unique().tolist()) <= {0, 2, 4, 6}
    assert torch.allclose(found.weight.sum(-1), torch.ones(20))


def test_a_pool_smaller_than_k_leaves_slots_unused():
    made, x = router(), torch.randn(5, 6)
    made.pool = torch.tensor([True, True] + [False] * 6)
    found = route(made, x)
    assert (found.used.sum(1) == 2).all()
    assert torch.allclose(found.weight.sum(-1), torch.ones(5))


@settings(max_examples=40)
@given(p=st.floats(0.01, 1.0), tokens=st.integers(0, 12), seed=st.integers(0, 5))
def test_top_p_is_the_smallest_set_that_reaches_p(p, tokens, seed):
    made = router(select={"kind": "top-p", "p": p}, weigh=AS_THEY_ARE)
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(seed))
    found = route(made, x)
    scores = (x @ made.scorer.weight.T).softmax(-1)
    for row, chosen in zip(scores, found.expert, strict=True):
        chosen = chosen[chosen != PAD]
        best = row.sort(descending=True).values
        least, most = (
            next((m for m in range(1, 9) if best[:m].sum() >= p + slack), 8)
            for slack in (-1e-6, 1e-6)  # sums of floats
        )
        assert least <= len(chosen) <= most
        assert torch.allclose(row[chosen].sort(descending=True).values, best[: len(chosen)])


def test_top_p_of_sigmoids_is_a_share_of_their_sum():
    made = router(select={"kind": "top-p", "p": 0.6}, activation="sigmoid", weigh="ones")
    x = torch.randn(30, 6)
    found = route(made, x)
    scores = (x @ made.scorer.weight.T).sigmoid()
    reached = scores.masked_fill(~torch.zeros(30, 9, dtype=bool).scatter(1, found.expert + 1, True)[:, 1:], 0).sum(1)
    assert (reached >= 0.6 * scores.sum(1) - 1e-6).all()
    last = scores.gather(1, found.expert.clamp(min=0)).masked_fill(~found.used, torch.inf).amin(1)
    assert (reached - last < 0.6 * scores.sum(1)).all()


def test_grouped_takes_as_many_from_every_group():
    site = Site(hidden_size=6, intermediate_size=4, num_experts=8, top_k=4)
    found = route(router(site, select={"kind": "grouped", "groups": 4}), torch.randn(30, 6))
    assert (torch.bincount(found.expert.flatten() // 2, minlength=4) == 30).all()


def test_grouped_takes_the_best_of_every_group_with_its_share_of_the_whole_softmax():
    site = Site(hidden_size=6, intermediate_size=4, num_experts=8, top_k=4)
    made, x = router(site, select={"kind": "grouped", "groups": 2}, weigh=AS_THEY_ARE), torch.randn(30, 6)
    found = route(made, x)
    scores = (x @ made.scorer.weight.T).softmax(-1)
    best = torch.cat([half.topk(2).indices + 4 * number for number, half in enumerate(scores.chunk(2, dim=1))], dim=1)
    assert torch.equal(found.expert.sort(1).values, best.sort(1).values)
    assert torch.allclose(found.weight, scores.gather(1, found.expert))


@pytest.mark.parametrize("weigh", ["scores", "chosen", "ones"])
@pytest.mark.parametrize("select", ["top-k", {"kind": "top-p", "p": 0.5}, {"kind": "grouped", "groups": 1}])
def test_edges(select, weigh):
    made = router(select=select, weigh=weigh)
    for tokens in (0, 1):
        found = route(made, torch.randn(tokens, 6))
        assert found.expert.shape[0] == tokens
    flat = route(made, torch.zeros(4, 6))  # all logits alike
    assert flat.weight.isfinite().all()
    assert (flat.used.sum(1) >= 1).all()
    huge = route(made, torch.full((4, 6), 1e4))
    assert huge.weight.isfinite().all()


def test_half_precision_keeps_scores_in_float32():
    made = router().to(torch.bfloat16)
    logits, weight, _ = made(torch.randn(4, 6, dtype=torch.bfloat16))
    assert weight.dtype == logits.dtype == torch.bfloat16
    assert made.scores(logits, Context()).dtype == torch.float32


def test_a_frozen_scorer_is_no_parameter_and_stays_as_drawn_whatever_trains():
    made = router(score={"kind": "linear", "bias": True, "frozen": True})
    assert not list(made.parameters())
    made.requires_grad_(True)  # as a loop does that trains everything
    assert not made.scorer.weight.requires_grad
    assert bool((made.scorer.weight != 0).any())
    assert set(made.state_dict()) == {"scorer.weight", "scorer.bias"}
    plain = router()
    plain.scorer.weight.data.copy_(made.scorer.weight)
    x = torch.randn(5, 6)
    assert torch.equal(made(x)[0], plain(x)[0])


def test_nan_is_ranked_last():
    made = router(activation="identity", weigh="ones")
    logits = torch.tensor([[float("nan"), 3.0, 1.0, 2.0, 0, 0, 0, 0]])
    assert made.select(logits, Context()).tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("select", ["top-k", {"kind": "grouped", "groups": 1}])
def test_a_token_of_nan_is_not_silently_left_out(select):
    made, x = router(select=select), torch.randn(3, 6)
    x[1] = float("nan")
    found = route(made, x)
    assert found.used[1].all()
    assert found.weight[1].isnan().all()
    assert found.weight[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"select": "topk"}, "selector 'topk' is not known: choose one of"),
        ({"select": {"kind": "top-k", "n": 2}}, "selector 'top-k' has no option 'n': it has k"),
        ({"select": {"kind": "top-k", "k": 9}}, "top-k of 9 among 8 experts: give 1 to 8"),
        ({"select": {"kind": "top-p", "p": 0.0}}, "p=0.0 is a share of the probability"),
        ({"select": {"kind": "grouped", "groups": 3}}, "3 groups do not divide 8 experts and their slots evenly"),
        ({"select": "grouped"}, "selector 'grouped' needs the option 'groups'"),
        ({"scorer": "linear"}, "a router has no part 'scorer': it has score, activation"),
        ({"score": {"kind": "mlp", "width": 0}}, "width=0 of an MLP that scores: give 1 or more"),
        ({"score": {"kind": "mlp", "activation": "x"}}, "activation='x' of an MLP that scores: choose one that"),
        (
            {"activation": "identity", "select": "top-p", "weigh": "ones"},
            "any sign, and this selector takes a share of their sum",
        ),
        (
            {"activation": "identity", "select": {"kind": "capped", "of": "top-p"}, "weigh": "ones"},
            "any sign, and this selector takes a share of their sum",
        ),
        ({"activation": {"kind": "sigmoid", "x": 1}}, "has no options"),
    ],
)
def test_what_a_configuration_cannot_say(parts, said):
    with pytest.raises(OptionError, match=said):
        Router(SITE, parts)


@pytest.mark.parametrize(("sizes", "said"), [({"num_experts": 0}, "0 experts"), ({"top_k": 9}, "top-k of 9 among 8")])
def test_a_layer_that_cannot_be(sizes, said):
    with pytest.raises(OptionError, match=said):
        Site(**{"hidden_size": 6, "intermediate_size": 4, "num_experts": 8, "top_k": 2} | sizes)
