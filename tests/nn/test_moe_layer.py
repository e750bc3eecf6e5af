"""The MoE layer: sums of its experts, kinds that cost nothing, balance terms with values known by hand."""

import pytest
import torch
from wholes import tiny, tokens

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn import (
    BALANCES,
    KINDS,
    Correction,
    Experts,
    FeedForward,
    MoE,
    MoekitForCausalLM,
    Router,
    Seen,
    Site,
    Standalone,
    finish_step,
    make,
    max_violation,
)
from moekit.nn.flow import begin, carry

E = 6


def site(**more):
    return Site(**{"hidden_size": 8, "intermediate_size": 4, "num_experts": E, "top_k": 2} | more)


def layer(others=(), **more):
    torch.manual_seed(0)
    at = site(choices=E + len(others))
    made = MoE(
        Router(at, corrected="correction" in more),
        Experts(Standalone, at),
        others=[make("expert", KINDS, kind, at) for kind in others],
        **more,
    )
    for module in made.modules():
        if hasattr(module, "initialise"):
            module.initialise(0.5)
    return made


def by_hand(made, x, routing):
    """Others, if there are any: zero, copy, constant."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(routing.expert[t].tolist(), routing.weight[t], strict=True):
            if e == E + 1:
                y[t] += w * x[t]
            elif e == E + 2:
                own = (made.others[2].mix.weight @ x[t]).softmax(0)
                y[t] += w * (own[0] * x[t] + own[1] * made.others[2].vector)
            elif 0 <= e < E:
                gate, up = (made.experts.gate_up_proj[e] @ x[t]).chunk(2)
                y[t] += w * (made.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    return y


@pytest.mark.parametrize("others", [(), ("zero", "copy", "constant")])
def test_the_layer_is_the_weighted_sum_of_what_was_chosen(others):
    made, x = layer(others), torch.randn(40, 8)
    routing = made.gate.routing(made.gate(x))
    if others:
        assert set(range(E, E + 3)) <= set(routing.expert.flatten().tolist())
    assert torch.allclose(made(x), by_hand(made, x, routing), atol=1e-5)


def test_shared_experts_are_added():
    shared = FeedForward(8, 4)
    made, x = layer(shared=shared), torch.randn(5, 8)
    alone = layer()
    assert torch.allclose(made(x), alone(x) + shared(x), atol=1e-5)


def test_gradients_reach_router_experts_and_kinds():
    made = layer(("zero", "copy", "constant"))
    made(torch.randn(200, 8)).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    made = layer(("copy",), balance={"load": (0.01, make("balance", BALANCES, "load", site(choices=E + 1)))}).train()
    context = begin(1, tokens, torch.device("cpu"))
    assert made(torch.randn(tokens, 8), context).shape == (tokens, 8)
    assert all(loss.isfinite() for loss in carry(context).losses.values())


def seen(logits, expert, **context):
    router = layer().gate
    weight = torch.ones(expert.shape) / expert.shape[1]
    return Seen(torch.zeros(len(logits), 8), Routing(expert, weight, logits), router, None, Context(**context))


@pytest.mark.parametrize("scope", ["sequence", "micro", "accumulated", "global"])
def test_uniform_probabilities_cost_one_whatever_the_load(scope):
    term = make("balance", BALANCES, {"kind": "load", "scope": scope}, site())
    one = seen(torch.zeros(10, E), torch.zeros(10, 1, dtype=torch.int64))
    assert float(term(one)) == pytest.approx(1.0)


def test_a_collapsed_router_costs_e_and_an_even_one_1():
    term = make("balance", BALANCES, "load", site())
    expert = torch.arange(E)[:, None]
    logits = torch.full((E, E), -50.0).scatter(1, expert, 50.0)
    assert float(term(seen(logits, expert))) == pytest.approx(1.0)
    assert float(term(seen(logits[:1].repeat(E, 1), expert[:1].repeat(E, 1)))) == pytest.approx(float(E))


def test_padding_counts_nowhere():
    term = make("balance", BALANCES, "load", site())
    logits, expert = torch.randn(9, E), torch.randint(0, E, (9, 2))
    padding = torch.tensor([False] * 6 + [True] * 3)
    assert torch.allclose(term(seen(logits, expert, padding=padding)), term(seen(logits[:6], expert[:6])))


def test_padding_moves_no_bias_and_is_no_load():
    made = layer(correction=Correction(rate=0.1)).train()
    x = torch.cat((torch.randn(6, 8), torch.ones(30, 8)))
    context = begin(1, 36, x.device, padding=torch.arange(36) >= 6)
    made(x, context)
    alone = layer(correction=Correction(rate=0.1)).train()
    short = begin(1, 6, x.device)
    alone(x[:6], short)
    assert torch.equal(carry(context).load[0], carry(short).load[0])
    finish_step(made)
    finish_step(alone)
    assert torch.equal(made.gate.bias, alone.gate.bias)


def test_the_bias_stays_in_float32_in_half_precision(tmp_path):
    model = tiny(correction={"rate": 0.001})
    model.model.layers[0].mlp.gate.bias += 0.2501
    model.save_pretrained(tmp_path)
    half = MoekitForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.gate.scorer.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.layers[0].mlp.gate.bias, model.model.layers[0].mlp.gate.bias)
    assert half(tokens()).logits.isfinite().all()


def test_the_accumulated_scope_counts_all_micro_batches_and_forgets_after_the_step():
    term = make("balance", BALANCES, {"kind": "load", "scope": "accumulated"}, site())
    micro = make("balance", BALANCES, "load", site())
    logits = torch.randn(8, E)
    first, second = torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1, dtype=torch.int64)
    assert torch.allclose(term(seen(logits, first)), micro(seen(logits, first)))
    both = term(seen(logits, second))
    mean = logits.softmax(-1).mean(0)
    assert torch.allclose(both, E * (0.5 * mean[0] + 0.5 * mean[1]))
    term.finish_step()
    assert torch.allclose(term(seen(logits, second)), micro(seen(logits, second)))


def test_sequences_apart_are_the_mean_of_each_alone():
    term, micro = (make("balance", BALANCES, {"kind": "load", "scope": s}, site()) for s in ("sequence", "micro"))
    logits, expert = torch.randn(10, E), torch.randint(0, E, (10, 2))
    sequence = torch.arange(2).repeat_interleave(5)
    each = [micro(seen(logits[i : i + 5], expert[i : i + 5])) for i in (0, 5)]
    assert torch.allclose(term(seen(logits, expert, sequence=sequence)), torch.stack(each).mean())


def test_z_entropy_and_importance_by_hand():
    logits, expert = torch.randn(7, E), torch.zeros(7, 1, dtype=torch.int64)
    one = seen(logits, expert)
    values = {name: float(make("balance", BALANCES, name, site())(one)) for name in ("z", "entropy", "importance")}
    p = logits.softmax(-1)
    assert values["z"] == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-5)
    assert values["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    mean = p.mean(0)
    assert values["importance"] == pytest.approx(float(mean.var(unbiased=False) / mean.mean() ** 2), rel=1e-4)


def test_the_correction_moves_every_bias_towards_balance_and_only_after_a_step():
    made = layer(correction=Correction(rate=0.1)).train()
    x = torch.randn(64, 8)
    before = made.gate.bias.clone()
    for _ in range(2):
        made(x)
    count = made.tally.count_E.clone()
    assert torch.equal(made.gate.bias, before)
    assert int(count.sum()) == 2 * 64 * 2
    finish_step(made)
    assert torch.allclose(made.gate.bias, 0.1 * (count.float().mean() - count).sign())
    assert int(made.tally.count_E.sum()) == 0
    made.eval()
    made(x)
    assert int(made.tally.count_E.sum()) == 0


@pytest.mark.parametrize("course", ["constant", "1/sqrt(n)", "1/n"])
@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_every_update_and_course_by_hand(update, course):
    bias, correction = torch.zeros(4), Correction(rate=0.3, update=update, course=course)
    count, expected = torch.tensor([10, 2, 4, 0]), torch.zeros(4)  # mean 4
    error = torch.tensor([-1.0, 1.0, 0.0, 1.0] if update == "sign" else [-1.5, 0.5, 0.0, 1.0])
    for step in (1, 2, 3):
        correction.step(bias, count)
        expected += 0.3 * error / {"constant": 1, "1/sqrt(n)": step**0.5, "1/n": step}[course]
        assert torch.allclose(bias, expected, atol=1e-6)


def test_the_correction_evens_a_skewed_load():
    scores = torch.rand(512, E, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 0.5, E)
    bias, correction = torch.zeros(E), Correction(rate=0.01)
    first = last = 0.0
    for step in range(200):
        count = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=E)
        first, last = (max_violation(count) if step == 0 else first), max_violation(count)
        correction.step(bias, count)
    assert last < 0.1 < first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0.0}, "rate=0.0"),
        ({"update": "x"}, "update='x'"),
        ({"course": "x"}, "course='x'"),
    ],
)
def test_corrections_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        Correction(**options)


@pytest.mark.parametrize(
    ("spec", "said"),
    [({"kind": "load", "scope": "x"}, "scope='x'"), ({"kind": "load", "probability": "x"}, "probability='x'")],
)
def test_terms_that_cannot_be(spec, said):
    with pytest.raises(OptionError, match=said):
        make("balance", BALANCES, spec, site())
