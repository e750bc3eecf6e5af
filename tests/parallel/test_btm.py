"""Branch-Train-Merge: the ensemble is exact Bayes, the average the average, and the prior what the paper says."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moekit.errors import OptionError
from moekit.parallel._outer_posterior import best_static, posteriors, smoothed
from moekit.parallel.btm import Ensemble, average, best, cached_prior

VOCABULARY = 5


class Bigram(nn.Module):
    """A language model that looks one token back; counts its calls."""

    def __init__(self, seed, sharp=1.0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(sharp * torch.randn(VOCABULARY, VOCABULARY, generator=draw))
        self.config, self.calls = SimpleNamespace(vocab_size=VOCABULARY), 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def rows(count, length, seed=0):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def probability(model, before, token):
    return float(model.table.detach()[before].softmax(-1)[token])


def by_hand(models, prior, row, update=True):
    """p(next token | row so far) by multiplying probabilities, one hypothesis at a time."""
    joint = list(prior)
    if update:
        for before, token in pairwise(row):
            joint = [p * probability(m, before, token) for p, m in zip(joint, models, strict=True)]
    weights = [p / sum(joint) for p in joint]
    return [
        sum(w * probability(m, row[-1], token) for w, m in zip(weights, models, strict=True))
        for token in range(VOCABULARY)
    ]


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=20)
def test_the_ensemble_is_bayes_multiplied_out(seed, update):
    models, prior, ids = [Bigram(seed + j) for j in range(3)], [0.5, 0.3, 0.2], rows(2, 7, seed)
    logits = Ensemble(models, prior, update=update)(input_ids=ids).logits
    assert torch.allclose(logits.exp().sum(-1), torch.ones(2, 7), atol=1e-5)
    for b in range(2):
        for s in range(7):
            expected = by_hand(models, prior, ids[b, : s + 1].tolist(), update)
            assert logits[b, s].exp().tolist() == pytest.approx(expected, abs=1e-5)


def test_a_token_does_not_weigh_the_models_for_itself():
    """Changing token s may change what is said from s on, never before."""
    models = [Bigram(j, 3.0) for j in range(2)]
    one, other = rows(1, 8), rows(1, 8)
    other[0, 5] = (one[0, 5] + 1) % VOCABULARY
    said = [Ensemble(models, [0.5, 0.5])(input_ids=ids).logits for ids in (one, other)]
    assert torch.equal(said[0][:, :5], said[1][:, :5])
    assert not torch.equal(said[0][:, 5], said[1][:, 5])


def test_mixing_is_of_probabilities_not_of_logits():
    models, ids = [Bigram(j, 3.0) for j in range(2)], rows(1, 4)
    said = Ensemble(models, [0.5, 0.5], update=False)(input_ids=ids).logits
    wrong = (models[0](ids).logits + models[1](ids).logits).log_softmax(-1)
    assert not torch.allclose(said, wrong, atol=0.1)


def test_long_texts_do_not_underflow():
    told = torch.full((2, 1, 5000), -20.0)
    told[1] -= 0.001
    weight = posteriors(told, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert float(weight[0, 0, -1]) == pytest.approx(-math.log1p(math.exp(-5.0)), abs=1e-3)


def test_padding_says_nothing_about_the_models():
    models, ids = [Bigram(j, 3.0) for j in range(2)], rows(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    ensemble = Ensemble(models, [0.6, 0.4])
    assert torch.allclose(ensemble(padded, mask).logits[:, 3:], ensemble(ids).logits, atol=1e-5)


def test_a_model_without_prior_is_not_run():
    models = [Bigram(j) for j in range(3)]
    prior = best(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 2)
    assert prior.tolist() == pytest.approx([0.0, 0.625, 0.375])
    Ensemble(models, prior)(input_ids=rows(1, 4))
    assert [model.calls for model in models] == [0, 1, 1]


def test_the_cached_prior_finds_who_wrote_the_text():
    models, draw = [Bigram(j, 4.0) for j in range(3)], torch.Generator().manual_seed(0)
    texts = []
    for _ in range(5):
        row = [0]
        for _ in range(40):
            row.append(int(torch.multinomial(models[2].table[row[-1]].softmax(-1), 1, generator=draw)))
        texts.append(torch.tensor(row))
    prior = cached_prior(models, texts)
    assert prior.argmax() == 2
    assert float(prior.sum()) == pytest.approx(1.0)
    one = posteriors(
        torch.stack([m(texts[0][:-1]).logits.log_softmax(-1).gather(-1, texts[0][1:, None]).T for m in models]),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    )
    assert torch.allclose(cached_prior(models, texts[:1]), one.exp().mean((1, 2)).detach(), atol=1e-5)


def test_smoothing_is_that_of_the_paper():
    values = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])]
    assert smoothed(values).tolist() == pytest.approx([0.7 * 0.7 + 0.3 * 0.5, 0.7 * 0.3 + 0.3 * 0.5])


def test_no_fixed_prior_is_better_than_that_of_em():
    draw = torch.Generator().manual_seed(1)
    told = torch.randn(3, 400, generator=draw) - 1
    prior = best_static(told)

    def score(p):
        return float((p.log()[:, None] + told.double()).logsumexp(0).mean())

    for _ in range(50):
        assert score(prior) >= score(torch.rand(3, generator=draw).double().softmax(0))


def test_averages_are_weighted_and_new():
    models = [Bigram(j) for j in range(3)]
    made = average(models, [0.5, 0.25, 0.25])
    expected = 0.5 * models[0].table + 0.25 * models[1].table + 0.25 * models[2].table
    assert torch.allclose(made.table, expected)
    assert torch.equal(average(models[:1], [1.0]).table, models[0].table)
    assert made.table is not models[0].table


def test_mistakes():
    models = [Bigram(0), Bigram(1)]
    for prior in ([0.5, 0.6], [1.0], [1.5, -0.5]):
        with pytest.raises(OptionError, match=r"for 2 models: give one number for each, none negative, with sum 1"):
            Ensemble(models, prior)
    with pytest.raises(OptionError, match="must have the same parameters: branch all of them from one seed"):
        average([models[0], nn.Linear(2, 2)], [0.5, 0.5])
    with pytest.raises(OptionError, match="3 of 2 models: choose from 1 to 2"):
        best(torch.tensor([0.5, 0.5]), 3)
    with pytest.raises(OptionError, match="a prior needs development text"):
        cached_prior(models, [])
