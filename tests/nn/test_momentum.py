"""Sublayers as steps of an optimizer over depth."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moekit.errors import OptionError
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.nn.config import Site
from moekit.nn.flow import begin, within
from moekit.nn.momentum import AdamStart, Momentum, RobustMomentum
from moekit.nn.wiring import Residual

SITE = Site(hidden_size=6, intermediate_size=4, num_experts=4, top_k=2)
DEPTH = 5
KINDS = ["momentum", {"kind": "momentum", "learnt": True}, "adam-momentum", "robust-momentum"]


class Slope(nn.Module):
    """A sublayer that returns ``-curvature * x``: minus the gradient of a bowl, as deep in each direction as told."""

    def __init__(self, curvature):
        super().__init__()
        self.curvature = torch.as_tensor(curvature)

    def forward(self, x, context):
        return -self.curvature * x


def through(wiring, hidden, sublayer, depth=DEPTH):
    """What leaves ``depth`` layers, all of the same kind."""
    context = begin(*hidden.shape[:2], hidden.device)
    for _ in range(depth):
        context = within(context)
        hidden = wiring(hidden, nn.Identity(), sublayer, context)
    return hidden


def model(wiring, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 4, "num_hidden_layers": 3}
    return MoekitForCausalLM(MoekitConfig(**sizes, num_attention_heads=2, wiring=wiring, **options)).eval()


def test_without_momentum_it_is_the_plain_residual():
    ids = torch.randint(0, 40, (2, 7))
    expected = model("residual")(ids).logits
    assert torch.equal(model({"kind": "momentum", "mu": 0.0, "gamma": 1.0})(ids).logits, expected)
    assert torch.equal(model({"kind": "residual", "gain": 1.0})(ids).logits, expected)
    still = model({"kind": "robust-momentum", "rho": 0.0, "ratio": 4.0, "smoothness": 4.0})(ids).logits
    torch.testing.assert_close(still, expected)
    assert not torch.allclose(model("momentum")(ids).logits, expected)


def test_gain():
    hidden = torch.randn(1, 2, 6)
    torch.testing.assert_close(through(Residual(SITE, Slope(1.0), gain=0.25), hidden, Slope(1.0), 1), 0.75 * hidden)


def test_heavy_ball_is_the_power_of_its_iteration_matrix():
    hidden, curvature, mu, gamma = torch.randn(2, 3, 6, dtype=torch.float64), 0.8, 0.6, 0.9
    step = torch.tensor([[1 - gamma * curvature, gamma * mu], [-curvature, mu]], dtype=torch.float64)
    found = through(Momentum(SITE, Slope(curvature), mu=mu, gamma=gamma), hidden, Slope(curvature))
    torch.testing.assert_close(found, hidden * torch.linalg.matrix_power(step, DEPTH)[0, 0])
    modulus = torch.linalg.eigvals(step).abs()
    torch.testing.assert_close(modulus, torch.full_like(modulus, math.sqrt(mu)))  # it oscillates: both are sqrt(mu)


def test_momentum_converges_where_plain_steps_of_that_length_diverge():
    hidden, slope = torch.ones(1, 1, 6), Slope(2.5)
    assert through(Residual(SITE, slope), hidden, slope, 40).abs().max() > 1e3
    assert through(Momentum(SITE, slope, mu=0.7), hidden, slope, 40).abs().max() < 0.1


def test_adam_in_the_first_layer_and_the_heavy_ball_after_it():
    hidden, slope = torch.randn(1, 2, 6), Slope(1.0)
    wiring = AdamStart(SITE, slope, mu=0.5, gamma=0.8, gamma_first=0.3, kappa=0.1)
    u = -hidden
    first = 0.9 * hidden + 0.3 * 0.1 * u / (0.001 * u**2 + 1e-8).sqrt()
    torch.testing.assert_close(through(wiring, hidden, slope, 1), first)
    torch.testing.assert_close(through(wiring, hidden, slope, 2), first + 0.8 * (0.5 * u - first))


def test_adam_keeps_small_half_precision_steps():
    hidden = torch.full((1, 1, 6), 1e-3, dtype=torch.float16)
    moved = through(AdamStart(SITE, Slope(1.0), kappa=1.0), hidden, Slope(1.0), 1)
    assert moved.dtype == torch.float16
    expected = -0.1 * 1e-3 / math.sqrt(0.001 * 1e-6 + 1e-8)
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=2e-3, atol=0)


def test_robust_momentum_by_hand_and_at_its_promised_rate():
    k, rho = 8.0, 0.75
    across = (1 - rho) ** 2 * (1 + rho)
    g, m, a = k * across / 2, k * rho**3 / (k - 1), rho**3 / ((k - 1) * across)
    curvature = torch.linspace(0.25, 2.0, 6, dtype=torch.float64)  # from L/k to L
    wiring, slope = RobustMomentum(SITE, Slope(1.0), rho=rho, ratio=k, smoothness=2.0), Slope(curvature)
    start = torch.ones(1, 1, 6, dtype=torch.float64)
    x, p = start, torch.zeros_like(start)
    for _ in range(DEPTH):
        p = m * p - g * curvature * (x + a * p)
        x = x + p
    torch.testing.assert_close(through(wiring, start, slope), x)
    far = through(wiring, start, slope, 60).abs().max()
    assert far < 60 * rho**58  # Cyrus et al., theorem 1: errors shrink by rho a step, up to a constant


@pytest.mark.parametrize("wiring", KINDS)
def test_in_a_model(wiring, tmp_path):
    lm = model(wiring, dense_layers=[1], balance={"load": 0.01})
    ids = torch.randint(0, 40, (2, 7))
    expected = lm(ids).logits
    assert torch.equal(lm(ids).logits, expected)  # nothing is kept from call to call
    lm.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    run = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(lm.generate(ids, **run), lm.generate(ids, use_cache=False, **run))
    lm.train()(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in lm.named_parameters()}
    assert all(bool(grad.isfinite().all()) for grad in plain.values())
    lm.zero_grad()
    lm.gradient_checkpointing_enable()
    lm(ids, labels=ids).loss.backward()
    for name, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


@pytest.mark.parametrize("wiring", [*KINDS, "chain"])
def test_in_half_precision_and_on_one_token(wiring):
    lm = model(wiring, balance={"load": 0.01}).to(torch.bfloat16).train()
    for ids in (torch.randint(0, 40, (2, 7)), torch.zeros(1, 1, dtype=torch.int64)):
        logits = lm(ids).logits
        assert logits.dtype == torch.bfloat16
        assert logits.shape == (*ids.shape, 40)
        logits.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in lm.parameters())


@pytest.mark.parametrize("wiring", [*KINDS, "chain", {"kind": "residual", "gain": 0.5}])
def test_a_block_that_joins_both_sublayers_itself_takes_no_wiring(wiring):
    with pytest.raises(OptionError, match="block 'parallel' joins both sublayers itself: leave out the wiring"):
        model(wiring, block="parallel")
    assert model("residual", block="parallel")


def test_mu_and_gamma_learn_where_asked():
    lm = model({"kind": "momentum", "learnt": True, "mu": 0.5, "gamma": 1.5})
    wiring = lm.model.layers[2].wiring
    assert (wiring.mu.item(), wiring.gamma.item()) == (0.5, 1.5)
    ids = torch.randint(0, 40, (2, 7))
    lm.train()(ids, labels=ids).loss.backward()
    assert wiring.mu.grad
    assert wiring.gamma.grad


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Momentum, {"mu": 1.0}, "mu=1 of momentum: give 0 or more and less than 1"),
        (AdamStart, {"beta2": 1.0}, "beta1=0.9, beta2=1 of Adam: give 0 or more and less than 1"),
        (RobustMomentum, {"ratio": 1.0}, "robust momentum needs 0 <= rho < 1, ratio > 1 and smoothness > 0"),
    ],
)
def test_bad_options(kind, options, says):
    with pytest.raises(OptionError, match=says):
        kind(SITE, Slope(1.0), **options)
