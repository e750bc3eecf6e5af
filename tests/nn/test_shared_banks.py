"""Layers that choose from one bank of experts."""

import copy
from contextlib import ExitStack

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moekit.blocks import blocks
from moekit.errors import OptionError, UnsupportedModelError
from moekit.nn import MoekitConfig, MoekitForCausalLM

N = 4
SIZES = {"vocab_size": 40, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": N, "num_hidden_layers": 4}
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))


def model(layers_per_bank=2, **options):
    torch.manual_seed(0)
    config = MoekitConfig(**SIZES, num_attention_heads=2, layers_per_bank=layers_per_bank, **options)
    return MoekitForCausalLM(config).eval()


def test_a_bank_holds_the_experts_of_its_layers_once():
    plain, shared = model(1), model(2)
    layers = shared.model.layers
    assert layers[0].mlp.experts is layers[1].mlp.experts
    assert layers[1].mlp.experts is not layers[2].mlp.experts
    assert layers[0].mlp.experts.num_experts == layers[0].mlp.gate.num_experts == 2 * N
    more = 4 * N * 8  # each router has as many rows again
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in plain.parameters()) + more
    assert sum(p.numel() for p in set(shared.parameters())) == sum(p.numel() for p in shared.parameters())


def test_with_all_foreign_experts_masked_it_is_the_plain_model():
    plain, shared = model(1), model(2)
    for number, (mine, theirs) in enumerate(zip(shared.model.layers, plain.model.layers, strict=True)):
        rows = slice(number % 2 * N, number % 2 * N + N)
        own = {name: tensor for name, tensor in theirs.state_dict().items() if "mlp" not in name}
        mine.load_state_dict(own, strict=False)
        with torch.no_grad():
            mine.mlp.gate.scorer.weight[rows] = theirs.mlp.gate.scorer.weight
            mine.mlp.experts.gate_up_proj[rows] = theirs.mlp.experts.gate_up_proj
            mine.mlp.experts.down_proj[rows] = theirs.mlp.experts.down_proj
        mine.mlp.gate.pool = torch.zeros(2 * N, dtype=torch.bool)
        mine.mlp.gate.pool[rows] = True
    shared.model.embed_tokens.weight.data = plain.model.embed_tokens.weight.data
    shared.lm_head.weight = shared.model.embed_tokens.weight
    torch.testing.assert_close(shared(IDS).logits, plain(IDS).logits)
    shared.model.layers[0].mlp.gate.pool = None
    assert not torch.allclose(shared(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_once_loaded_shared_and_copied_shared(tmp_path, tie):
    lm = model(4, tie_word_embeddings=tie)
    expected = lm(IDS).logits
    lm.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "experts.down_proj" in name]) == 1  # noqa: SIM118
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(lm)):
        torch.testing.assert_close(again(IDS).logits, expected)
        assert again.model.layers[3].mlp.experts.down_proj is again.model.layers[0].mlp.experts.down_proj


def test_one_update_of_an_expert_that_two_layers_used():
    lm = model(4).train()
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    weight = lm.model.layers[0].mlp.experts.down_proj
    before = weight.clone()
    lm(IDS, labels=IDS).loss.backward()
    grad = weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(weight, before - grad)
    assert len([p for group in optimizer.param_groups for p in group["params"] if p is weight]) == 1


def test_dense_layers_and_a_last_bank_of_fewer():
    lm = model(3, dense_layers=[1], others=["zero"])
    gates = [getattr(layer.mlp, "gate", None) for layer in lm.model.layers]
    assert [gate.num_experts if gate else None for gate in gates] == [2 * N + 1, None, 2 * N + 1, N + 1]
    assert lm(IDS).logits.isfinite().all()


def test_a_layer_without_experts_brings_none_however_it_is_said():
    said = model(2, dense_layers=[1]), model(2, feed_forward=["moe", {"kind": "dense"}, "moe", "moe"])
    counts = [[layer.mlp.gate.num_experts for layer in lm.model.layers if hasattr(layer.mlp, "gate")] for lm in said]
    assert counts == [[N, 2 * N, 2 * N]] * 2


def test_views_of_single_layers_are_refused():
    says = "model.layers.0.mlp.experts and model.layers.1.mlp.experts are one bank of experts"
    with pytest.raises(UnsupportedModelError, match=says):
        blocks(model(2))
    assert len(blocks(model(1))) == 4


def test_each_layer_of_a_bank_is_looked_at_by_itself():
    lm, seen = model(2, others=["zero"]), []
    views = blocks(lm, shared=True)
    assert [view.name for view in views] == [f"model.layers.{n}.mlp" for n in range(4)]
    assert views[0].experts is views[1].experts
    with ExitStack() as stack, torch.no_grad():
        for view in views:
            stack.enter_context(view.observe(seen.append))
        load = lm(IDS).expert_load
    assert [one.block.name for one in seen] == [view.name for view in views]
    for one, count in zip(seen, load, strict=True):
        chosen = one.routing.expert[one.routing.used]
        assert torch.equal(torch.bincount(chosen, minlength=2 * N), count[: 2 * N])


def test_bad_options():
    with pytest.raises(OptionError, match="layers_per_bank=0: give 1 or more"):
        model(0)
    with pytest.raises(OptionError, match="experts 'subspace' keep more than weights: no bank of several"):
        model(2, experts="subspace")
