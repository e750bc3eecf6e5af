"""Experts that cost unequally, and experts of powers of two."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import lives, tiny, tokens

from moekit.contract import Context, route
from moekit.errors import OptionError
from moekit.nn import MoE, Router, Seen, Site, Standalone
from moekit.nn.costs import Cost, NoisySoftmax, chance_of_choice
from moekit.nn.experts import Experts
from moekit.nn.flow import begin, carry
from moekit.nn.powers import PowerExperts, power_of_two

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=1)


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20))
def test_rounding_is_to_the_nearest_exponent(values):
    weight = torch.tensor(values)
    out = power_of_two(weight)
    for value, rounded in zip(weight.tolist(), out.tolist(), strict=True):
        if value == 0:
            assert rounded == 0
            continue
        exponents = range(-15, 1)
        distance = [abs(torch.tensor(abs(value)).log2().item() - e) for e in exponents]
        assert abs(abs(rounded).as_integer_ratio()[0].bit_count()) == 1
        assert abs(torch.tensor(abs(value)).log2() - torch.tensor(abs(rounded)).log2()) <= min(distance) + 1e-5
        assert (rounded > 0) == (value > 0)


@given(st.integers(-(2**20), 2**20), st.integers(-15, 0), st.booleans())
def test_a_product_with_one_is_a_shift(x, exponent, negative):
    weight = power_of_two(torch.tensor([(-1.0 if negative else 1.0) * 1.2 * 2.0**exponent], dtype=torch.float64))
    shifted = ((x << 15) >> -exponent) * (-1 if negative else 1)
    assert float(weight * x) * 2**15 == shifted


def test_the_gradient_passes_the_rounding():
    weight = torch.randn(5, requires_grad=True)
    (power_of_two(weight) * torch.arange(5.0)).sum().backward()
    assert weight.grad.tolist() == [0, 1, 2, 3, 4]


def test_some_experts_shift_and_the_others_do_not():
    torch.manual_seed(0)
    bank = PowerExperts(Standalone(), SITE, shifted=[1, 3])
    bank.initialise(0.3)
    plain = Experts(Standalone(), SITE)
    with torch.no_grad():
        plain.gate_up_proj.copy_(bank.gate_up_weight)
        plain.down_proj.copy_(bank.down_weight)
    x, weight = torch.randn(9, 6), torch.rand(9, 1)
    for expert in range(4):
        index = torch.full((9, 1), expert)
        same = torch.allclose(bank(x, index, weight), plain(x, index, weight), atol=1e-6)
        assert same is (expert in (0, 2))
    with torch.no_grad():
        for parameter in (plain.gate_up_proj, plain.down_proj):
            parameter[[1, 3]] = power_of_two(parameter[[1, 3]])
    index = torch.arange(9)[:, None] % 5  # 4 marks an unused slot
    assert torch.allclose(bank(x, index, weight), plain(x, index, weight), atol=1e-6)
    assert bank.shifted == [1, 3]
    assert PowerExperts(Standalone(), SITE).shifted == [2, 3]


def test_chances_are_those_of_drawing_the_noise_again():
    torch.manual_seed(1)
    clean, noise, k = torch.randn(3, 5), 0.7, 2
    noisy = clean + noise * torch.randn(3, 5)
    found = chance_of_choice(clean, noisy, k, noise)
    for i in range(5):
        again = noisy[:, None].repeat(1, 20000, 1)
        again[:, :, i] = clean[:, i, None] + noise * torch.randn(3, 20000)
        hits = (again.topk(k, dim=2).indices == i).any(2).float().mean(1)
        assert torch.allclose(found[:, i], hits, atol=0.02)
    assert torch.equal(chance_of_choice(clean, noisy, 5, noise), torch.ones(3, 5))


def test_where_fewer_are_allowed_than_slots_they_are_sure():
    clean = torch.tensor([[0.3, -torch.inf, 0.1, -torch.inf]], requires_grad=True)
    out = chance_of_choice(clean, clean.detach() + 0.1, 3, 0.5)
    assert out.tolist() == [[1, 0, 1, 0]]
    out.sum().backward()
    assert clean.grad.isfinite().all()


def minimised(costs, steps=250):
    """Shares of work after minimising the loss alone over free logits."""
    torch.manual_seed(2)
    site = Site(hidden_size=128, intermediate_size=4, num_experts=len(costs), top_k=1)
    router = Router(site, {"activation": "noisy-softmax", "weigh": {"kind": "scores", "normalise": False}})
    x, term = torch.eye(128), Cost(site, costs=costs)  # one column of the router a token: free logits
    torch.nn.init.normal_(router.scorer.weight, std=0.3)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    for _ in range(steps):
        context = begin(1, 128, x.device)
        routing = route(router.train(), x, router.entered(x, context))
        loss = term(Seen(x, routing, router, None, context))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = router.score(x, Context())
    drawn = [logits + router.activation.noise * torch.randn_like(logits) for _ in range(100)]
    load = torch.bincount(torch.cat(drawn).argmax(1), minlength=len(costs)) / 12800
    return logits.detach().softmax(-1).mean(0), load, float(loss)


@pytest.mark.parametrize("costs", [[6.0, 4.0], [1.0, 2.0, 4.0]])
def test_least_where_work_is_in_proportion_to_speed(costs):
    importance, load, loss = minimised(costs)
    wanted = 1 / torch.tensor(costs)
    wanted /= wanted.sum()
    assert torch.allclose(importance, wanted, atol=0.03)
    assert torch.allclose(load, wanted, atol=0.03)
    assert loss < 0.02


def test_closed_form_and_what_counts_without_noise():
    router = Router(SITE)
    router.initialise = None
    x = torch.randn(8, 6)
    context = begin(1, 8, x.device)
    seen = Seen(x, route(router, x, context), router, None, context)  # zero rows: all equal, all to the first expert
    p, q = torch.tensor([1.0, 2, 3, 4]) / 4, torch.tensor([1.0, 0, 0, 0])
    expected = sum(v.var(unbiased=False) / (v.mean() ** 2 + 1e-10) for v in (p, q))
    assert torch.isclose(Cost(SITE, costs=[1, 2, 3, 4])(seen), expected)
    assert torch.isclose(Cost(SITE, costs=[1e-7, 2e-7, 3e-7, 4e-7])(seen), expected)  # in any unit


def test_noise_is_for_training_and_does_not_stay():
    torch.manual_seed(3)
    part, logits, context = NoisySoftmax(SITE, noise=0.5), torch.zeros(4000, 4), begin(1, 4000, torch.device("cpu"))
    out = part.train()(logits, context).log()
    spread = (out - out.mean(1, keepdim=True)).std()
    assert abs(float(spread) - 0.5 * 0.75**0.5) < 0.01
    assert torch.equal(part.eval()(logits, context), logits.softmax(-1))
    assert NoisySoftmax(SITE).noise == 0.25
    layer = MoE(
        Router(SITE, {"activation": "noisy-softmax"}),
        Experts(Standalone(), SITE),
        balance={"cost": (0.01, Cost(SITE, costs=[1, 1, 2, 2]))},
    ).train()
    context = begin(1, 7, torch.device("cpu"))
    layer(torch.randn(7, 6), context)
    assert float(carry(context).losses["cost"]) > 0
    assert carry(context).state == {}


def test_in_a_model(tmp_path):
    fields = {
        "experts": {"kind": "power-of-two", "shifted": [0]},
        "router": {"activation": "noisy-softmax", "weigh": {"kind": "scores", "normalise": False}},
        "balance": {"cost": {"weight": 0.01, "costs": [4, 6, 6, 6]}},
        "num_experts_per_tok": 1,
    }
    model = lives(tmp_path, **fields)
    bank = model.model.layers[0].mlp.experts
    assert bank.active_parameters() == sum(p.numel() for p in bank.parameters()) // 4
    loss = tiny(**fields).train()(tokens(1, 1), labels=tokens(1, 1))
    assert loss.losses["cost"].isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PowerExperts(Standalone(), SITE, shifted=[4]), "experts 0 to 3"),
        (lambda: NoisySoftmax(SITE, noise=0), "must be positive"),
        (lambda: Cost(SITE, costs=[1, 2]), "give 4 positive numbers"),
        (lambda: Cost(SITE, costs=[1, 2, 0, 1]), "give 4 positive numbers"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(OptionError, match=message):
        call()
