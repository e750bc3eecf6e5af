"""The cosine scorer: its formula, what it does not see, and that its temperature learns."""

import pytest
import torch
import torch.nn.functional as F
from wholes import leaks, lives

from moekit.contract import Context
from moekit.errors import OptionError
from moekit.nn import Router, Site
from moekit.nn.scorers import Cosine

SITE = Site(hidden_size=6, intermediate_size=4, num_experts=5, top_k=2)


def made(**options):
    torch.manual_seed(0)
    scorer = Cosine(SITE, **options)
    scorer.initialise(0.3)
    return scorer


@pytest.mark.parametrize("temperature", [0.3, 1.0, 0.07])
def test_it_is_the_cosine_over_the_temperature(temperature):
    scorer, x = made(temperature=temperature), torch.randn(9, 6)
    expected = F.cosine_similarity(x[:, None], scorer.weight[None], dim=-1) / temperature
    torch.testing.assert_close(scorer(x, Context()), expected)
    torch.testing.assert_close(scorer(scorer.weight, Context()).diagonal(), torch.full((5,), 1 / temperature))


def test_lengths_are_not_seen():
    scorer, x = made(), torch.randn(9, 6)
    before = scorer(x, Context())
    scorer.weight.data *= torch.rand(5, 1) + 0.1
    torch.testing.assert_close(scorer(x * (10 * torch.rand(9, 1) + 0.1), Context()), before)
    assert before.abs().max() <= 1 / 0.3 + 1e-5


def test_a_token_of_zeros_knows_no_direction():
    assert torch.equal(made()(torch.zeros(1, 6), Context()), torch.zeros(1, 5))
    assert made()(torch.zeros(0, 6), Context()).shape == (0, 5)


def test_the_temperature_learns():
    scorer, x = made(), torch.randn(9, 6)
    loss = scorer(x, Context()).square().sum()
    loss.backward()
    expected = -2 * loss / scorer.temperature  # of c^2 / t^2
    torch.testing.assert_close(scorer.temperature.grad, expected.detach())


def test_in_a_model(tmp_path):
    model = lives(tmp_path, router={"score": {"kind": "cosine", "temperature": 0.5}})
    assert not leaks(model)


@pytest.mark.parametrize("temperature", [0.0, -0.3])
def test_temperatures_that_cannot_be(temperature):
    with pytest.raises(OptionError, match=rf"temperature={temperature:g} of a cosine must be positive"):
        Router(SITE, {"score": {"kind": "cosine", "temperature": temperature}})
