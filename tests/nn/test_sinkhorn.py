"""Balanced transport plans, and a router that follows one now and then."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import lives, tiny, tokens

from moekit.contract import Context
from moekit.errors import OptionError
from moekit.nn import Router, Site
from moekit.nn.sinkhorn import SelectiveSinkhorn, residual, transport

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2)


def plain(gain, temperature, iterations):
    """The same scaling without logarithms, in float64."""
    kernel = (gain.double() / temperature).exp()
    tokens, choices = kernel.shape
    row = torch.ones(tokens, dtype=torch.float64)
    for _ in range(iterations):
        column = (tokens / choices) / (kernel.T @ row)
        row = 1 / (kernel @ column)
    return row[:, None] * kernel * column


@given(st.integers(1, 30), st.integers(1, 6), st.sampled_from([0.3, 1.0, 5.0]), st.integers(0, 999))
def test_marginals_and_the_plain_solver(tokens_, choices, temperature, seed):
    gain = torch.randn(tokens_, choices, generator=torch.Generator().manual_seed(seed))
    plan, done = transport(gain, temperature, tolerance=1e-4, iterations=5000)
    assert residual(plan) < 1e-4
    assert torch.allclose(plan.sum(1), torch.ones(tokens_), atol=1e-5)
    assert torch.allclose(plan.sum(0), torch.full((choices,), tokens_ / choices), atol=1e-4)
    assert torch.allclose(plan, plain(gain, temperature, done).float(), atol=1e-5)


def test_small_temperatures_do_not_overflow_and_find_the_best_assignment():
    torch.manual_seed(0)
    gain = torch.rand(4, 4)
    plan, _ = transport(gain * 100, 0.5, iterations=3000)
    best = max(itertools.permutations(range(4)), key=lambda p: sum(float(gain[i, j]) for i, j in enumerate(p)))
    assert plan.argmax(1).tolist() == list(best)
    assert plan.isfinite().all()


def test_the_plan_is_the_best_of_its_marginals():
    """No direction within the marginals raises gain plus entropy."""
    torch.manual_seed(1)
    gain = torch.randn(6, 3, dtype=torch.float64)
    plan, _ = transport(gain, 0.7, tolerance=1e-12, iterations=5000)
    value = lambda p: float((p * gain).sum() - 0.7 * (p * p.log()).sum())  # noqa: E731
    for _ in range(50):
        step = torch.randn(6, 3, dtype=torch.float64)
        step -= step.mean(0, keepdim=True)
        step -= step.mean(1, keepdim=True)
        assert value(plan + 1e-3 * step / step.abs().max() * plan.min()) < value(plan)


def test_every_step_a_plan_no_step_a_plan():
    torch.manual_seed(2)
    logits = torch.randn(40, 4) * 3
    every = SelectiveSinkhorn(SITE, share=1.0, temperature=1.0, iterations=500)
    plan = every.train()(logits, Context())
    assert torch.allclose(plan.sum(0), torch.full((4,), 10.0), atol=1e-3)
    assert torch.equal(every.eval()(logits, Context()), logits.softmax(-1))
    never = SelectiveSinkhorn(SITE, share=0.0).train()
    assert torch.equal(never(logits, Context()), logits.softmax(-1))


def test_share_is_how_often_and_a_replayed_draw_is_the_same():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(3)) * 3
    part, plain_ = SelectiveSinkhorn(SITE, share=0.3, iterations=2).train(), logits.softmax(-1)
    torch.manual_seed(4)
    drawn = [not torch.equal(part(logits, Context()), plain_) for _ in range(300)]
    assert 60 < sum(drawn) < 120
    torch.manual_seed(4)
    assert drawn == [not torch.equal(part(logits, Context()), plain_) for _ in range(300)]


def test_weights_are_the_plans_and_choices_too():
    torch.manual_seed(5)
    router = Router(SITE, {"activation": {"kind": "selective-sinkhorn", "share": 1.0, "temperature": 0.5}}).train()
    torch.nn.init.normal_(router.scorer.weight)
    x = torch.randn(60, 6) + 1.0
    logits, weight, expert = router(x)
    plan, _ = transport(logits, 0.5)
    value, best = plan.topk(2, dim=1)
    assert torch.equal(expert, best)
    assert torch.allclose(weight, value / value.sum(1, keepdim=True), atol=1e-5)
    counts = [torch.bincount(e.flatten(), minlength=4).float().std() for e in (expert, router.eval()(x)[2])]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_passes_the_plan_only_if_asked(detach):
    logits = torch.randn(12, 4, requires_grad=True)
    part = SelectiveSinkhorn(SITE, share=1.0, detach=detach).train()
    (part(logits, Context()) * torch.randn(12, 4)).sum().backward()
    assert bool((logits.grad != 0).any()) is not detach


@pytest.mark.parametrize("gain", ["logits", "softmax"])
def test_padding_and_barred_choices_stay_outside(gain):
    torch.manual_seed(6)
    logits = torch.randn(20, 4)
    logits[:, 2] = -torch.inf
    logits[7] = torch.nan
    padding = torch.arange(20) >= 15
    out = SelectiveSinkhorn(SITE, share=1.0, temperature=1.0, gain=gain, noise=0.5).train()(
        logits, Context(padding=padding)
    )
    live = ~padding & (torch.arange(20) != 7)
    assert torch.equal(out[padding], logits[padding].softmax(-1))
    assert bool((out[:, 2][live] == 0).all())
    assert torch.allclose(out[live].sum(0)[[0, 1, 3]], torch.full((3,), 14 / 3), atol=1e-3)


def test_edges():
    part = SelectiveSinkhorn(SITE, share=1.0).train()
    assert part(torch.zeros(0, 4), Context()).shape == (0, 4)
    assert torch.allclose(part(torch.zeros(3, 4), Context()), torch.full((3, 4), 0.25))
    assert torch.allclose(part(torch.randn(1, 4), Context()), torch.full((1, 4), 0.25), atol=1e-3)
    assert part(torch.randn(5, 4, dtype=torch.bfloat16), Context()).dtype == torch.float32


def test_in_a_model(tmp_path):
    lives(tmp_path, router={"activation": {"kind": "selective-sinkhorn", "share": 1.0, "detach": False}})


def test_recomputation_draws_the_same():
    losses = []
    for again in (False, True):
        model = tiny(router={"activation": {"kind": "selective-sinkhorn", "share": 0.5, "noise": 0.3}}).train()
        if again:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*losses, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share=1.5 is a share"),
        ({"temperature": 0}, "temperature > 0"),
        ({"noise": -1}, "noise >= 0"),
        ({"iterations": 0}, "1 iteration or more"),
        ({"gain": "cost"}, "choose logits or softmax"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        SelectiveSinkhorn(SITE, **options)
