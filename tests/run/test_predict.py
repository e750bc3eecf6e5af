"""Predictors rank what later layers will want."""

import pytest
import torch

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.contract import Context, Routing
from moekit.run._predictors_gate import NextGate, rank_routing
from moekit.run.predict import Signal
from moekit.stream import LoadedModel


@pytest.fixture(scope="module")
def mini():
    return LoadedModel.load(Checkpoint.open("moekit:mini")).model


def linear_gate(weight_EH):
    def gate(x_TH):
        logits = x_TH @ weight_EH.T
        weight, expert = logits.softmax(1).topk(2)
        return Routing(expert, weight, logits)

    return gate


def test_next_gate_is_the_later_router_on_the_current_input(mini):
    x_TH = torch.randn(1, blocks(mini)[0].hidden_size, generator=torch.Generator().manual_seed(0))
    found = NextGate.of_model(mini).predict(2, Signal(x_TH=x_TH.to(mini.dtype)), 3)
    assert len(found) == 3
    for later, ranking in enumerate(found, start=3):
        block = blocks(mini)[later]
        chosen = block.choose(x_TH.to(mini.dtype), Context()).expert[0].tolist()
        assert {expert for expert, _ in ranking[: block.top_k]} == set(chosen)
        assert sorted(expert for expert, _ in ranking) == list(range(16))
        assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)


def test_horizon_ends_with_the_last_layer(mini):
    gates, x_TH = NextGate.of_model(mini), torch.zeros(1, blocks(mini)[0].hidden_size, dtype=mini.dtype)
    assert len(gates.predict(5, Signal(x_TH=x_TH), 8)) == 2
    assert gates.predict(7, Signal(x_TH=x_TH), 1) == []
    assert gates.predict(0, Signal(), 2) == [[], []]


def test_scales_put_the_later_norm_on_the_current_stream():
    draw = torch.Generator().manual_seed(1)
    stream_TH, weight_EH = torch.randn(5, 6, generator=draw), torch.randn(8, 6, generator=draw)
    scale_LH = torch.rand(2, 6, generator=draw) + 0.5
    normed = stream_TH / stream_TH.pow(2).mean(1, keepdim=True).sqrt()
    gate = linear_gate(weight_EH)
    found = NextGate([gate, gate], list(scale_LH)).predict(0, Signal(x_TH=normed * scale_LH[0]), 1)
    expected, raw = (rank_routing(gate(normed * scale)) for scale in (scale_LH[1], scale_LH[0]))
    assert [e for e, _ in found[0]] == [e for e, _ in expected]
    assert [s for _, s in found[0]] == pytest.approx([s for _, s in expected], abs=1e-6)
    assert [s for _, s in found[0]] != pytest.approx([s for _, s in raw], abs=1e-3)


def test_a_batch_is_ranked_by_how_many_tokens_choose():
    logits = torch.tensor([[5.0, 4.0, 0.0, 0.0], [0.0, 4.0, 5.0, 0.0], [9.0, 1.0, 0.0, 0.5]])
    weight, expert = logits.softmax(1).topk(2)
    assert [e for e, _ in rank_routing(Routing(expert, weight, logits))] == [1, 0, 2, 3]
