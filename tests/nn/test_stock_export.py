"""Where a configuration equals a stock family its checkpoint is one; where none does, it says why."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from wholes import tiny, tokens

from moekit.cli import main
from moekit.errors import CheckpointError, OptionError, OutputError, UnsupportedModelError
from moekit.nn import stock
from moekit.nn.stock import export

RAW = {"weigh": {"kind": "scores", "normalise": False}}
SIGMOID = {"activation": "sigmoid", "weigh": {"kind": "scores", "scale": 2.5}}
LIMITED = {"select": {"kind": "group-limited", "groups": 4, "keep": 2, "k": 3}}
GROUPS = {"num_experts": 8, "correction": {}, "shared_expert_intermediate_size": 16, "router": SIGMOID | LIMITED}


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "mixtral"),
        ({"router": {"weigh": "chosen"}, "num_key_value_heads": 2, "tie_word_embeddings": False}, "mixtral"),
        ({"qk_norm": True}, "qwen3_moe"),
        ({"qk_norm": True, "router": RAW, "dense_layers": [1], "intermediate_size": 24}, "qwen3_moe"),
        ({"qk_norm": True, "router": SIGMOID, "correction": {}, "shared_expert_intermediate_size": 32}, "dots1"),
        ({"router": SIGMOID, "shared_expert_intermediate_size": 16, "dense_layers": [0]}, "glm4_moe"),
        (GROUPS, "glm4_moe"),
        (GROUPS | {"qk_norm": True, "dense_layers": [0], "shared_expert_intermediate_size": 32}, "dots1"),
        ({"router": {"select": {"kind": "group-limited", "groups": 2, "keep": 2}}}, "mixtral"),  # limits nothing
        ({"attention": {"kind": "softmax"}, "wiring": {"kind": "residual"}}, "mixtral"),
        ({"attention": ["softmax", {"kind": "softmax", "window": None}], "block": {"kind": "sequential"}}, "mixtral"),
        ({"experts": {"kind": "stacked"}, "wiring": {"kind": "residual", "gain": 1}}, "mixtral"),
        ({"router": {"select": {"kind": "top-k", "k": 3}, "granularity": {"kind": "token"}}}, "mixtral"),
        ({"router": {"weigh": {"kind": "scores", "own": False}, "activation": {"kind": "softmax"}}}, "mixtral"),
        ({"router": {"score": {"kind": "linear", "frozen": True, "bias": False}}}, "mixtral"),
        (
            {"num_experts": [4, 4], "num_experts_per_tok": [1, 3], "router": {"select": {"kind": "top-k", "k": 2}}},
            "mixtral",
        ),
        ({"qk_norm": True, "feed_forward": ["dense", {"kind": "moe"}], "intermediate_size": 24}, "qwen3_moe"),
        ({"qk_norm": True, "feed_forward": "dense", "intermediate_size": 24}, "qwen3_moe"),
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
        (
            {"attention": {"kind": "softmax", "window": 4}},
            "no stock family has attention = {'kind': 'softmax', 'window'",
        ),
        (
            {"attention": ["softmax", {"kind": "softmax", "weights": "stick-breaking"}]},
            "has attention = {'kind': 'softm",
        ),
        ({"wiring": {"kind": "residual", "gain": 0.5}}, "no stock family has wiring = "),
        ({"feed_forward": ["moe", "nothing"]}, "no stock family has feed_forward = 'nothing'"),
        ({"memory": "moe"}, "no stock family has memory = 'moe'"),
        ({"layers_per_bank": 2}, "no stock family has layers_per_bank = 2"),
        ({"router": {"score": {"kind": "linear", "bias": True}}}, "a router with score = "),
        ({"router": {"weigh": {"kind": "scores", "own": True}}}, "a router with weigh = "),
        (
            {"router": {"select": {"kind": "group-limited", "groups": 2, "keep": 1}}},
            "no groups",
        ),
        ({**GROUPS, "router": SIGMOID | {"select": {**LIMITED["select"], "highest": 1}}}, "a router with select = "),
        (
            {"num_experts": 1, "num_experts_per_tok": 1, "router": SIGMOID, "shared_expert_intermediate_size": 16},
            "ranks groups by their two best experts",
        ),
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


def test_weights_that_are_no_numbers_are_never_published(tmp_path):
    model = tiny()
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(OutputError, match="differ by nan of the largest: nothing was written"):
        export(tmp_path / "own", tmp_path / "stock")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"hidden_size": 16},
            CheckpointError,
            r"embed_tokens.weight has shape \[40, 32\], its configuration asks for \[",
        ),
        (
            {"num_hidden_layers": 3},
            CheckpointError,
            "layers.2.input_layernorm.weight is missing, and its configuration",
        ),
        ({"num_hidden_layers": 1}, CheckpointError, "layers.1.input_layernorm.weight has no place in the model"),
        ({"tie_word_embeddings": False}, CheckpointError, "lm_head.weight is missing"),
        ({"correction": {}}, CheckpointError, "correction.steps is missing"),
        ({"hidden_size": "wide"}, CheckpointError, "config.json is no valid moekit config: .*'hidden_size'"),
        ({"rope_parameters": {"rope_type": "x"}}, CheckpointError, "no valid moekit config: rope_type='x': choose one"),
        ({"attention": "x"}, OptionError, "attention 'x' is not known"),
        ({"router": {"scorer": "linear"}}, OptionError, "a router has no part 'scorer'"),
        (
            {"quantization_config": {"quant_method": "x"}},
            UnsupportedModelError,
            "is compressed: export the model it was made of",
        ),
    ],
)
def test_a_configuration_that_is_not_of_these_weights(changes, error, said, tmp_path, monkeypatch, capsys):
    tiny().save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr(stock.MoekitForCausalLM, "from_pretrained", None)  # no weight is read
    with pytest.raises(error, match=said):
        export(tmp_path / "own", tmp_path / "stock")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "own"), "--output", str(tmp_path / "stock")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("moekit: ")


def test_an_output_in_the_way(tmp_path):
    with pytest.raises(OutputError, match="exists"):
        export(tmp_path, tmp_path)
