"""Where a configuration equals a stock family its checkpoint is one; where none does, it says why."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from wholes import tiny, tokens

from moekit.errors import OutputError, UnsupportedModelError
from moekit.nn import stock
from moekit.nn.stock import export

RAW = {"weigh": {"kind": "scores", "normalise": False}}
SIGMOID = {"activation": "sigmoid", "weigh": {"kind": "scores", "scale": 2.5}}


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "mixtral"),
        ({"router": {"weigh": "chosen"}, "num_key_value_heads": 2, "tie_word_embeddings": False}, "mixtral"),
        ({"qk_norm": True}, "qwen3_moe"),
        ({"qk_norm": True, "router": RAW, "dense_layers": [1], "intermediate_size": 24}, "qwen3_moe"),
        ({"qk_norm": True, "router": SIGMOID, "correction": {}, "shared_expert_intermediate_size": 32}, "dots1"),
        ({"router": SIGMOID, "shared_expert_intermediate_size": 16, "dense_layers": [0]}, "glm4_moe"),
    ],
)
def test_the_stock_model_computes_the_same(fields, family, tmp_path):
    model = tiny(**fields)
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None and gate.bias is not None:
            gate.bias.copy_(torch.linspace(-0.3, 0.3, len(gate.bias)))
    model.save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "stock")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert other.config.model_type == family
    ids = tokens()
    assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "stock"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"wiring": "momentum"}, "no stock family has wiring = 'momentum'"),
        ({"others": ["zero"]}, "experts of the kinds"),
        ({"num_experts": [4, 2]}, "numbers of experts, or of slots, that differ between layers"),
        ({"router": {"select": {"kind": "top-p", "p": 0.5}}}, "a router with select = "),
        ({"router": {"activation": "sigmoid", "weigh": "chosen"}}, "weighs by a softmax over the chosen"),
        ({"router": SIGMOID}, "no stock family computes this model: mixtral has no norm"),
    ],
)
def test_what_no_family_has_is_named(fields, said, tmp_path):
    tiny(**fields).save_pretrained(tmp_path / "own")
    with pytest.raises(UnsupportedModelError, match=said):
        export(tmp_path / "own", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_other_logits_are_never_published(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "own")
    monkeypatch.setattr(stock, "difference", lambda *_: 0.5)
    with pytest.raises(OutputError, match=r"differ by 5\.0e-01 of the largest: nothing was written"):
        export(tmp_path / "own", tmp_path / "stock")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_an_output_in_the_way(tmp_path):
    with pytest.raises(OutputError, match="exists"):
        export(tmp_path, tmp_path)
