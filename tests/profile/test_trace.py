"""Traces say what the model did, token by token, whether they come from a profile or from a live recorder."""

import numpy as np
import pytest
import torch

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import ProfileError, UnsupportedModelError
from moekit.profile import RoutingTrace, TraceRecorder, profile, record
from moekit.stream import LoadedModel


@pytest.fixture(scope="module")
def mini():
    return LoadedModel.load(Checkpoint.open("moekit:mini")).model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return {name: [torch.randint(32, 120, (n,), generator=generator) for n in (5, 8)] for name in ("a", "b")}


@pytest.fixture(scope="module")
def trace(mini, prompts):
    return record(mini, prompts, new_tokens=4, inputs=True, scores=True)


def test_shapes_steps_and_phases(mini, trace):
    layers = len(blocks(mini))
    assert trace.expert.shape == (2 * (5 + 8 + 2 * 4), layers, blocks(mini)[0].top_k)
    assert trace.domains == ("a", "b")
    assert trace.sequence.tolist() == sorted(trace.sequence.tolist())
    assert len(set(trace.sequence)) == 4
    assert trace.decode.sum() == 4 * 4
    assert len(np.unique(trace.step)) == 4 * (1 + 4)
    assert (trace.expert >= 0).all()
    assert trace.weight.shape == trace.expert.shape
    assert trace.scores.shape[2] == 16
    assert np.allclose(trace.scores.astype(float).sum(2), 1, atol=1e-2)


def test_routing_is_what_the_block_chooses_on_the_recorded_inputs(mini, trace):
    for index, block in enumerate(blocks(mini)):
        x = torch.from_numpy(trace.inputs[:, index]).to(mini.dtype)
        chosen = block.choose(x).expert.sort(1).values.numpy()
        same = (chosen == np.sort(trace.expert[:, index], 1)).all(1)
        assert same.mean() > 0.95  # inputs are kept in half precision, so near ties may turn


def test_requests_hold_each_step_once(trace):
    requests = trace.requests
    assert len(requests) == len(np.unique(trace.step)) * trace.num_layers
    for request in requests:
        own = trace.expert[request.start : request.stop, request.layer]
        assert set(request.experts) == set(own.flatten().tolist())
        assert sum(request.counts) == own.size
    assert sum(r.stop - r.start for r in requests if r.layer == 0) == len(trace)


def test_split_keeps_sequences_whole_and_is_seeded(trace):
    one, two = trace.split(0.5, seed=1)
    assert set(one.sequence) & set(two.sequence) == set()
    assert len(one) + len(two) == len(trace)
    assert set(one.domain) == set(two.domain) == {0, 1}
    assert np.array_equal(trace.split(0.5, seed=1)[0].expert, one.expert)


def test_of_domain(trace):
    assert set(trace.of_domain("b").domain) == {1}
    with pytest.raises(ProfileError, match="no domain 'c': it has a, b"):
        trace.of_domain("c")


def test_a_profile_gives_the_same_routing(mini, prompts):
    own = [p.numpy() for p in prompts["a"]]
    made = profile("moekit:mini", {"a": own}, sequence_length=16, decode_tokens=3, held_out=0.0, sample=0)
    kept, live = RoutingTrace.of_profile(made), record(mini, prompts["a"], new_tokens=3)
    by_length = [{int((t.sequence == s).sum()): t.take(t.sequence == s) for s in (0, 1)} for t in (kept, live)]
    for length in (5 + 3, 8 + 3):
        one, two = by_length[0][length], by_length[1][length]
        assert np.array_equal(np.sort(one.expert, 2), np.sort(two.expert, 2))
        assert np.array_equal(one.decode, two.decode)
        assert np.array_equal(one.step - one.step[0], two.step - two.step[0])


def test_batched_padding_is_left_out(mini):
    ids = torch.tensor([[0, 0, 40, 41], [50, 51, 52, 53]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with TraceRecorder(mini) as recorder, torch.no_grad():
        mini(input_ids=ids, attention_mask=mask)
    trace = recorder.trace()
    assert trace.sequence.tolist() == [0, 0, 1, 1, 1, 1]
    assert trace.token.tolist() == [40, 41, 50, 51, 52, 53]


def test_errors(mini):
    with pytest.raises(ProfileError, match="nothing was recorded"):
        TraceRecorder(mini).trace()
    with pytest.raises(UnsupportedModelError, match="Linear is a dense model"):
        TraceRecorder(torch.nn.Linear(2, 2))
    made = profile("moekit:mini", {"a": [np.arange(32, 64)]}, sequence_length=16, held_out=0.0, sample=0, trace=0)
    with pytest.raises(ProfileError, match="holds no trace"):
        RoutingTrace.of_profile(made)
