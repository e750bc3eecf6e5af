"""Routers and layers at the extremes: nothing to route, one expert for all, float16 that overflows, many experts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wholes import tiny, tokens

from moekit.nn import BALANCES, Experts, MoE, Router, Site, Standalone, make
from moekit.nn.activations import ACTIVATIONS
from moekit.nn.flow import begin, carry, extended
from moekit.nn.granularity import GRANULARITIES
from moekit.nn.scorers import SCORERS
from moekit.nn.selectors import SELECTORS
from moekit.nn.weighers import WEIGHERS

H, E = 6, 16
SITE = Site(hidden_size=H, intermediate_size=4, num_experts=E, top_k=2, vocab_size=40)
NEEDED = {
    "grouped": {"groups": 2},
    "group-limited": {"groups": 4, "keep": 2},
    "expert-choice": {"share": 0.25},
    "task-aware": {"tasks": 3, "width": 2},
    "label": {"labels": 3},
    "mlp": {"width": 8},
    "recurrent": {"width": 8},
    "product-key": {"key": 4},
}


def specs(table):
    return [{"kind": kind, **NEEDED.get(kind, {})} for kind in table]


def whole(spec):
    return spec["kind"]


PAIRS = [
    pytest.param(select, activation, id=f"{select['kind']}-{activation['kind']}")
    for select in specs(SELECTORS)
    for activation in specs(ACTIVATIONS)
    if (select["kind"], activation["kind"]) != ("top-p", "identity")  # no share of a sum of any sign
]


def started(module, std=1.0):
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "initialise"):
            part.initialise(std)
        elif isinstance(part, torch.nn.Linear | torch.nn.LayerNorm):
            part.reset_parameters()
    return module


def told(x, choices):
    """A context in which every kind of scorer finds what it reads."""
    ids = torch.arange(len(x)) % 3
    context = begin(1, len(x), x.device, input_ids=ids, modality=ids, task=ids)
    return extended(context, offered=torch.randn(len(x), choices, generator=torch.Generator().manual_seed(0)).to(x))


def layer(site=SITE, balance=(), **parts):
    terms = {name: (0.01, make("balance", BALANCES, name, site)) for name in balance}
    return started(MoE(Router(site, parts), Experts(Standalone, site), balance=terms), 0.5)


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (0, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_empty_logits_and_costs_nothing(shape, training):
    model = tiny(balance={"load": 0.01}).train(training)
    ids = torch.zeros(shape, dtype=torch.int64)
    out = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert out.logits.shape == (*shape, 40)
    assert float(out.loss.detach()) == 0
    out.loss.backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_one_token_has_nothing_to_predict_and_costs_its_balance_alone():
    model = tiny(balance={"load": 0.01}).train()
    out = model(tokens(1, 1), labels=tokens(1, 1))
    assert out.logits.shape == (1, 1, 40)
    torch.testing.assert_close(out.loss, out.losses["load"])


@pytest.mark.parametrize("tokens_", [1, 40])
def test_all_tokens_to_one_expert(tokens_):
    site = Site(hidden_size=H, intermediate_size=4, num_experts=E, top_k=1)
    made = layer(site, balance=("load", "z", "importance", "entropy"), score={"kind": "linear", "bias": True}).train()
    with torch.no_grad():
        made.gate.scorer.weight.zero_()
        made.gate.scorer.bias.copy_(torch.where(torch.arange(E) == 3, 40.0, 0.0))
    x = torch.randn(tokens_, H, requires_grad=True)
    context = begin(1, tokens_, x.device)
    y = made(x, context)
    gate, up = (made.experts.gate_up_proj[3] @ x.T).chunk(2)
    torch.testing.assert_close(y, (made.experts.down_proj[3] @ (torch.nn.functional.silu(gate) * up)).T)
    assert carry(context).load[0].tolist() == [0, 0, 0, tokens_, *[0] * (E - 4)]
    losses = carry(context).losses
    torch.testing.assert_close(losses["load"], torch.tensor(0.01 * E))
    (y.square().sum() + sum(losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in [x, *made.parameters()])
    own = made.experts.down_proj.grad.abs().sum((1, 2))
    assert own[3] > 0
    assert float(own.sum()) == float(own[3])


@pytest.mark.parametrize(("select", "activation"), PAIRS)
def test_logits_all_alike_and_all_barred_but_one(select, activation):
    made = layer(balance=("load", "z"), select=select, activation=activation, weigh="chosen").train()
    x = torch.zeros(5, H, requires_grad=True)
    for pool in (None, torch.arange(E) == 7):
        made.gate.pool = pool
        context = begin(1, 5, x.device)
        y = made(x, context)
        assert y.isfinite().all()
        assert all(loss.isfinite() for loss in carry(context).losses.values())
        (y.sum() + sum(carry(context).losses.values())).backward()
        assert all(p.grad.isfinite().all() for p in [x, *made.parameters()] if p.grad is not None)
    assert set(carry(context).load[0].nonzero().flatten().tolist()) <= {7}


@pytest.mark.parametrize(("select", "activation"), PAIRS)
@given(size=st.sampled_from([1.0, 3e2, 6e4]), seed=st.integers(0, 9))
def test_float16_that_overflows_routes_as_float32_does(select, activation, size, seed):
    made = started(Router(SITE, {"select": select, "activation": activation, "weigh": "chosen"})).eval().half()
    x = (size * torch.randn(7, H, generator=torch.Generator().manual_seed(seed))).clamp(-65504, 65504).half()
    found = made.routing(made(x))
    same = made.float()
    expected = same.routing(same(x.float()))
    assert torch.equal(found.expert, expected.expert)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.weight, expected.weight.half())
    assert found.weight.isfinite().all()


@pytest.mark.parametrize("score", specs(SCORERS), ids=whole)
def test_logits_of_float16_are_finite_or_barred_and_give_gradients(score):
    made = started(Router(SITE, {"score": score})).half()
    x = torch.full((7, H), 6e4, dtype=torch.float16, requires_grad=True)
    logits, weight, _ = made(x, told(x, E))
    assert not logits.isnan().any()
    assert not (logits == math.inf).any()
    assert weight.isfinite().all()
    if weight.requires_grad:
        weight.sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float16 for p in made.parameters())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything returned."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return out


def largest(parts, tokens_=128, size=256, choices=64):
    """Of a pass and its gradient, as a share of T * E * H."""
    site = Site(hidden_size=size, intermediate_size=4, num_experts=choices, top_k=2, vocab_size=40)
    made = started(Router(site, parts)).train()
    x = torch.randn(tokens_, size, requires_grad=True)
    context = told(x, choices)
    with Largest() as seen:
        _, weight, _ = made(x, context)
        if weight.requires_grad:
            weight.square().sum().backward()
    return seen.most / (tokens_ * choices * size)


STAGES = {
    "score": SCORERS,
    "activation": ACTIVATIONS,
    "select": SELECTORS,
    "weigh": WEIGHERS,
    "granularity": GRANULARITIES,
}


@pytest.mark.parametrize(
    ("stage", "spec"), [(stage, spec) for stage, table in STAGES.items() for spec in specs(table)], ids=str
)
def test_no_router_makes_a_tensor_of_tokens_by_experts_by_hidden_size(stage, spec):
    more = {"weigh": "chosen"} if spec["kind"] == "identity" else {}
    assert largest({stage: spec, **more}) <= 1 / 4


def test_such_a_tensor_would_be_found(monkeypatch):
    def slow(self, x_TH, context):
        return (x_TH[:, None] * self.weight).sum(-1)

    monkeypatch.setattr(SCORERS["linear"], "forward", slow)
    assert largest({}) >= 1
