"""Stock siblings of dense families: found, equal right after upcycling, or refused with what stood in the way."""

import pytest
import torch
from building import SIZES, dense, logits
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from moekit.blocks import blocks
from moekit.build._dense import dense_layers, feed_forward, part
from moekit.build._upcycle import check_equal, copies, difference, probe_rows, silent_copies, upcycle
from moekit.checkpoint.upcycle import MoEForm, sibling_config
from moekit.errors import UnsupportedModelError

WIDTH = SIZES["intermediate_size"]
ALL = MoEForm(layers=(0, 1, 2), num_experts=4, top_k=2, intermediate_size=WIDTH)
OTHER = MoEForm(layers=(0, 2), num_experts=4, top_k=2, intermediate_size=WIDTH)
SHARED = MoEForm(
    layers=(0, 1, 2), num_experts=4, top_k=1, intermediate_size=WIDTH, normalised=False, shared=True
)  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "granite": (GraniteForCausalLM, GraniteConfig),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_change_nothing_in_any_family(name):
    model = dense(0, *FAMILIES[name])
    made = upcycle(model, ALL, copies(4))
    assert check_equal(model, made, probe_rows(model)) < 1e-5
    assert [block.num_experts for block in blocks(made)] == [4, 4, 4]


def test_every_other_layer():
    model = dense()
    made = upcycle(model, OTHER, copies(4))
    assert [block.layer for block in blocks(made)] == [0, 2]
    assert torch.allclose(logits(made), logits(model), atol=1e-5)
    assert feed_forward(made) == ["model.layers.0.mlp.*", "model.layers.2.mlp.*", "model.layers.1.mlp.*"]


@pytest.mark.parametrize("name", [None, "llama"])
def test_a_shared_expert_alone_is_the_dense_model(name):
    model = dense(0, *FAMILIES[name]) if name else dense()
    made = upcycle(model, SHARED, silent_copies(4))
    assert check_equal(model, made, probe_rows(model)) < 1e-5
    assert difference(model, upcycle(model, SHARED, copies(4)), probe_rows(model)) > 1e-3


def test_one_expert_that_differs_is_seen():
    model = dense()
    made = upcycle(model, OTHER, lambda ffn: [ffn.weights, *[part(ffn.weights, torch.arange(WIDTH).flip(0))] * 3])
    assert check_equal(model, made, probe_rows(model)) < 1e-5  # hidden units in another order are the same function
    wrong = upcycle(model, OTHER, lambda ffn: [ffn.weights._replace(down=2 * ffn.weights.down), *copies(3)(ffn)])
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        check_equal(model, wrong, probe_rows(model))


def test_the_same_seed_gives_the_same_routers():
    one, other, third = (upcycle(dense(), OTHER, copies(4), seed=seed) for seed in (3, 3, 4))
    gates = [blocks(model)[0].router_module.weight for model in (one, other, third)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    assert one.training is False


@pytest.mark.parametrize(
    ("config", "form", "message"),
    [
        (LlamaConfig(**SIZES), OTHER, r"4 experts of width 32, top-2.*layers \[0, 2\]: tried .*in layers \[0, 1, 2\]"),
        (Qwen2Config(**SIZES), ALL, "no stock Mixture-of-Experts family holds a qwen2 model.*none is known"),
        (MistralConfig(**SIZES), SHARED, "raw weights, a shared expert.*it normalises the weights of the chosen"),
        (Olmo2Config(**SIZES), SHARED, "its layers have no shared expert"),
    ],
)
def test_families_that_cannot_hold_it(config, form, message):
    with pytest.raises(UnsupportedModelError, match=message):
        sibling_config(config, form)


def test_dense_layers_are_read_as_they_compute():
    model = dense()
    ffn, x = dense_layers(model)[1], torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ ffn.weights.gate_up.T).chunk(2, dim=-1)
    by_hand = (torch.nn.functional.silu(gate) * up) @ ffn.weights.down.T
    with torch.no_grad():
        assert torch.allclose(ffn.module(x), by_hand, atol=1e-5)
    assert (ffn.layer, ffn.intermediate_size) == (1, 32)
    with pytest.raises(UnsupportedModelError, match="has no feed-forward layer of gate, up and down"):
        dense_layers(torch.nn.Linear(2, 2))
    biased = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    biased.model.layers[0].mlp.down_proj = torch.nn.Linear(32, 16)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp has biases"):
        dense_layers(biased)
