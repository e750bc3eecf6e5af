"""Selectors by value: percentiles, positive scores, cumulative probability."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from wholes import leaks, lives, tiny, tokens

from moekit.contract import PAD, Context
from moekit.errors import OptionError
from moekit.nn.parts import Site
from moekit.nn.selectors import TopP
from moekit.nn.thresholds import Percentile, Support, percentile

E = 6
SITE = Site(hidden_size=4, intermediate_size=4, num_experts=E, top_k=2)
ROWS = arrays(np.float32, st.tuples(st.integers(1, 5), st.just(E)), elements=st.floats(-4, 4, width=32))


def sets(expert_TK):
    return [{int(e) for e in row if e != PAD} for row in expert_TK]


def probabilities(values):
    return torch.tensor(values).softmax(-1)


@given(ROWS, st.integers(0, 99).map(lambda percent: percent / 100))
def test_percentiles_are_numpys(values, share):
    found = percentile(torch.tensor(values), share)[:, 0].numpy()
    np.testing.assert_array_equal(found, np.quantile(values, share, axis=1, method="higher").astype(np.float32))


@given(ROWS, st.integers(0, 99).map(lambda percent: percent / 100))
def test_each_token_uses_what_is_above_its_own_percentile(values, share):
    scores = probabilities(values)
    chosen = sets(Percentile(SITE, share=share)(scores, Context()))
    least = np.quantile(scores.numpy(), share, axis=1, method="higher")
    assert chosen == [{e for e in range(E) if row[e] >= t} for row, t in zip(scores, least, strict=True)]


def test_own_percentiles_give_every_token_as_many_and_a_batchs_do_not():
    scores = (torch.randn(200, E, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)
    assert {len(s) for s in sets(Percentile(SITE, share=0.6)(scores, Context()))} == {E - 3}
    together = [len(s) for s in sets(Percentile(SITE, share=0.6, scope="batch").train()(scores, Context()))]
    assert min(together) >= 1
    assert len(set(together)) > 1
    assert sum(together) == pytest.approx(0.4 * scores.numel(), abs=len(scores) * 0.05)


def test_outside_training_the_mean_of_earlier_batches_decides():
    part = Percentile(SITE, share=0.5, scope="batch", pace=0.25)
    scores = [probabilities(np.random.default_rng(i).normal(size=(9, E))).float() for i in range(3)]
    wanted = None
    for one in scores[:2]:
        part.train()(one, Context())
        now = np.quantile(one.numpy().ravel(), 0.5, method="higher")
        wanted = now if wanted is None else wanted + 0.25 * (now - wanted)
    assert float(part.threshold) == pytest.approx(wanted)
    part.eval()
    whole, alone = part(scores[2], Context()), part(scores[2][4:5], Context())
    assert sets(whole)[4] == sets(alone)[0]
    assert float(part.threshold) == pytest.approx(wanted)


def test_padding_has_no_say_in_the_percentile_of_a_batch():
    scores = probabilities(np.random.default_rng(5).normal(size=(8, E))).float()
    padded = torch.cat((torch.eye(E)[:4], scores))
    padding = torch.arange(12) < 4
    alone, beside = (Percentile(SITE, share=0.5, scope="batch").train() for _ in range(2))
    expected = sets(alone(scores, Context()))
    assert sets(beside(padded, Context(padding=padding)))[4:] == expected
    assert float(beside.threshold) == float(alone.threshold)
    nothing = Percentile(SITE, share=0.5, scope="batch").train()
    assert sets(nothing(scores, Context(padding=torch.ones(8, dtype=torch.bool)))) == [
        {int(e)} for e in scores.argmax(1)
    ]
    assert nothing.threshold.isnan()


def test_the_mean_of_earlier_batches_stays_in_float32(tmp_path):
    model = tiny(router={"select": {"kind": "percentile", "scope": "batch", "share": 0.5}}).train()
    model(tokens())
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for one, other in zip(model.model.layers, half.model.layers, strict=True):
        assert torch.equal(one.mlp.gate.selector.threshold, other.mlp.gate.selector.threshold)
        assert other.mlp.gate.scorer.weight.dtype == torch.bfloat16
    assert half(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("scope", ["token", "batch"])
def test_edges_of_percentiles(scope):
    part = Percentile(SITE, share=0.9, scope=scope).train()
    scores = torch.full((3, E), 1 / E)
    scores[1] = torch.nan
    scores[2] = -torch.inf
    scores[2, 4] = 0.01
    found = sets(part(scores, Context()))
    assert (found[0], found[2]) == (set(range(E)), {4})
    assert found[1], "NaN is to be found out, not passed over"
    assert part(torch.empty(0, E), Context()).shape == (0, 1)
    bias = torch.zeros(E)
    bias[3] = 1.0
    assert sets(part(torch.full((1, E), 1 / E), Context(), bias)) == [{3}]


@given(ROWS, st.floats(0.01, 1))
def test_top_p_is_the_smallest_set_that_reaches_p(values, p):
    scores = probabilities(values).double()
    for row, found in zip(scores, sets(TopP(SITE, p=p)(scores, Context())), strict=True):
        order = sorted(range(E), key=lambda e: -row[e])
        mass, count = 0.0, 0
        while count < E and (mass < p or not count):
            mass, count = mass + float(row[order[count]]), count + 1
        close = any(abs(float(row[order[:n]].sum()) - p) < 1e-9 for n in range(1, E + 1))
        assert close or len(found) == count
        assert sum(sorted(row.tolist(), reverse=True)[: len(found)]) == pytest.approx(float(row[list(found)].sum()))


def test_support_takes_what_is_positive():
    scores = torch.tensor([[0.0, 0.7, 0.0, 0.1, 0.2, 0.0], [0.0] * 6, [1.0, 0, 0, 0, 0, 0]])
    assert Support(SITE)(scores, Context()).tolist() == [[1, 4, 3], [PAD] * 3, [0, PAD, PAD]]
    assert Support(SITE, most=2)(scores, Context()).tolist() == [[1, 4], [PAD] * 2, [0, PAD]]
    assert sets(Support(SITE)(torch.full((1, E), torch.nan), Context())) == [set(range(E))]


@pytest.mark.parametrize("select", [{"kind": "percentile", "scope": "batch", "share": 0.5}, "percentile", "top-p"])
def test_lives(tmp_path, select):
    model = lives(tmp_path, router={"select": select}, balance={"load": 0.01, "entropy": 0.01})
    assert not leaks(model)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"kind": "percentile", "share": 1}, "share=1 of a percentile: give 0 to below 1"),
        ({"kind": "percentile", "scope": "all"}, "scope='all' of a percentile: choose one of token, batch"),
        ({"kind": "percentile", "pace": 0}, "pace=0 of a running mean"),
        ({"kind": "support", "most": 9}, "most=9 of 4 experts: give 1 to 4"),
        ({"kind": "top-p", "p": 1.5}, "p=1.5 is a share of the probability"),
    ],
)
def test_bad_options(select, message):
    with pytest.raises(OptionError, match=message):
        tiny(router={"select": select})
