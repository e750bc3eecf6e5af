"""Predictors that remember, and those that are trained, on routings whose rule is known."""

import numpy as np
import pytest
import torch

from moekit.errors import OptionError, ProfileError
from moekit.profile import RoutingTrace
from moekit.run._predictors_gate import NextGate, fit_gates
from moekit.run._predictors_path import PathPredictor, probabilities, train_path
from moekit.run._predictors_seen import Frequency, Oracle, PreviousToken, TokenTable, usage
from moekit.run.policy import policy
from moekit.run.predict import PREDICTORS, Signal, predictor
from moekit.run.replay import replay


def trace_of_tokens(sequences, routes, layers=2, experts=8, **optional):
    """One token at a time; ``routes(previous token, token, layer)`` gives the experts."""
    token = np.concatenate([np.asarray(s) for s in sequences])
    before = np.concatenate([[0, *s[:-1]] for s in sequences])
    expert = np.array([[routes(b, t, layer) for layer in range(layers)] for b, t in zip(before, token, strict=True)])
    return RoutingTrace(
        expert=expert,
        weight=np.full(expert.shape, 0.5, np.float32),
        sequence=np.repeat(np.arange(len(sequences)), [len(s) for s in sequences]),
        step=np.arange(len(token)),
        decode=np.ones(len(token), bool),
        num_experts=(experts,) * layers,
        domain=np.zeros(len(token), int),
        token=token,
        **optional,
    )


def draws(seed, count=24, length=20, vocabulary=4):
    return np.random.default_rng(seed).integers(0, vocabulary, (count, length)).tolist()


def by_token(before, token, layer):
    return (token + layer) % 8, (token + layer + 4) % 8


def by_both(before, token, layer):
    return (before + token + layer) % 8, (2 * before + token + 4 + layer) % 8


def recall(predictor, trace, k=2):
    found, asked = 0, 0
    for request in trace.requests:
        if request.layer == 0:
            own = slice(request.start, request.stop)
            signal = Signal(token=trace.token[own], sequence=trace.sequence[own])
            rankings = predictor.predict(-1, signal, trace.num_layers)
        found += len({e for e, _ in rankings[request.layer][:k]} & set(request.experts))
        asked += len(request.experts)
        predictor.observe(request.layer, request.experts)
    return found / asked


def test_usage_marks_used_experts_only():
    trace = trace_of_tokens([[1, 2]], by_token)
    trace.expert[0, 0, 1] = -1
    assert np.flatnonzero(usage(trace)[0, 0]).tolist() == [1]
    assert np.flatnonzero(usage(trace)[1, 1]).tolist() == [3, 7]


def test_frequency_ranks_by_prior_and_learns():
    prior = Frequency((4, 4), np.array([[0.1, 0.9, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]), weight=10)
    first, second = prior.predict(-1, Signal(), 2)
    assert [e for e, _ in first] == [1, 2, 0, 3]
    assert second == []
    for _ in range(9):
        prior.observe(0, [3])
    assert [e for e, _ in prior.predict(-1, Signal(), 1)[0]] == [1, 3, 2, 0]


def test_previous_token_repeats_and_forgets_at_a_new_sequence():
    last = PreviousToken(2)
    last.observe(1, [5, 3])
    assert last.predict(0, Signal(), 4) == [[(5, 1.0), (3, 1.0)]]
    last.reset()
    assert last.predict(0, Signal(), 1) == [[]]


def test_table_knows_what_a_token_does_and_nothing_about_context():
    seen, fresh = (trace_of_tokens(draws(seed), by_token) for seed in (0, 1))
    assert recall(TokenTable(seen), fresh) == 1
    seen, fresh = (trace_of_tokens(draws(seed), by_both) for seed in (0, 1))
    assert recall(TokenTable(seen), fresh) < 0.7


def test_oracle_is_right_and_makes_every_lookup_hit():
    trace = trace_of_tokens(draws(3, 4), by_both)
    assert recall(Oracle(trace.requests, 2), trace) == 1
    found = replay(trace, policy("lru"), 6, Oracle(trace.requests, 2), width=2)
    assert found.hit_rate == 1
    assert found.useless_prefetch_bytes == 0
    assert found.prefetch_hits == found.prefetches < found.lookups


def test_path_net_learns_what_depends_on_context_and_is_reproducible():
    seen, fresh = (trace_of_tokens(draws(seed, 32), by_both) for seed in (4, 5))
    net = train_path(seen, steps=250, window=16, batch=16)
    assert recall(PathPredictor(net, (8, 8)), fresh) > 0.95 > recall(TokenTable(seen), fresh)
    again = train_path(seen, steps=2, window=16)
    same = train_path(seen, steps=2, window=16)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), same.parameters(), strict=True))


def test_forecasts_do_not_depend_on_how_a_text_is_cut_into_steps():
    net = train_path(trace_of_tokens(draws(6), by_both), steps=1, window=8)
    tokens = np.asarray(draws(7, 1, 7)[0])
    whole = probabilities(net, tokens, 7)
    parts = np.concatenate([probabilities(net, tokens[: i + 1], 1) for i in range(7)])
    assert np.allclose(whole, parts, atol=1e-5)
    assert probabilities(net, np.asarray(draws(8, 1, 40)[0]), 40).shape == (40, 2, 8)


def test_path_predictor_is_silent_without_tokens_and_below_its_threshold():
    net = train_path(trace_of_tokens(draws(6), by_both), steps=1, window=8)
    assert PathPredictor(net, (8, 8)).predict(-1, Signal(), 2) == [[], []]
    assert PathPredictor(net, (8, 8), threshold=1.0).predict(-1, Signal(token=np.array([1])), 2) == [[], []]


def test_fitted_gates_find_a_linear_rule():
    draw = np.random.default_rng(0)
    x_TH, weight_EH = draw.normal(size=(600, 6)), draw.normal(size=(8, 6))
    chosen = np.argsort(-(x_TH @ weight_EH.T), 1)[:, :2]
    inputs = np.stack([x_TH, draw.normal(size=x_TH.shape)], 1).astype(np.float16)
    trace = trace_of_tokens([[0] * 600], lambda *_: (0, 1), inputs=inputs)
    trace.expert[:, 1] = chosen
    gates = NextGate(fit_gates(trace))
    right = sum(
        len(
            {e for e, _ in gates.predict(0, Signal(x_TH=torch.from_numpy(x_TH[t : t + 1]).float()), 1)[0][:2]}
            & set(own)
        )
        for t, own in enumerate(chosen.tolist())
    )
    assert right / 1200 > 0.6  # chance is 0.25


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name not in ("next-gate", "pre-gate", "path")])
def test_predictors_by_name(name):
    trace = trace_of_tokens(draws(0, 3), by_token)
    assert len(predictor(name, seen=trace).predict(-1, Signal(token=np.array([1])), 2)) == 2


def test_what_is_missing_is_named():
    trace = trace_of_tokens([[1, 2]], by_token)
    with pytest.raises(OptionError, match="unknown predictor 'next-gat'; did you mean 'next-gate'"):
        predictor("next-gat")
    with pytest.raises(OptionError, match="next-gate asks the model's own routers: give the model"):
        predictor("next-gate")
    with pytest.raises(OptionError, match="path is learned from a routing trace"):
        predictor("path")
    with pytest.raises(ProfileError, match="no router inputs"):
        predictor("pre-gate", seen=trace)
    bare = trace_of_tokens([[1], [2]], by_token)
    with pytest.raises(ProfileError, match="no sequence of two tokens"):
        train_path(bare)
    object.__setattr__(bare, "token", None)
    for make in (TokenTable, train_path):
        with pytest.raises(ProfileError, match="no token ids"):
            make(bare)
