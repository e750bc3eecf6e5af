"""Finding blocks: what is refused, and that the list of exceptions is the whole list."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, build
from moekit.blocks import UNSUPPORTED, blocks, families
from moekit.contract import Router, Routing
from moekit.errors import PlanError, UnsupportedModelError
from moekit.formats import PackedBank
from moekit.kernels import BankExperts


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a dense model"):
        blocks(LlamaForCausalLM(config))


def test_a_model_that_says_experts_but_has_none_is_not_called_dense() -> None:
    model, _ = build("mixtral")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="says it has 8 experts, but no module holds them"):
        blocks(model)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & set(UNSUPPORTED)))
def test_exceptions_are_refused_with_their_reason(family: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        blocks(build(family)[0])
    assert UNSUPPORTED[family] in str(error.value)


def test_families_lists_what_is_installed() -> None:
    found = families()
    assert set(FAMILIES) <= set(found)
    assert {name for name, reason in found.items() if reason} == set(UNSUPPORTED)


def test_blocks_of_a_model_without_weights() -> None:
    model, _ = build("gpt_oss")
    found = blocks(model.to("meta"))
    assert [block.num_experts for block in found] == [8, 8, 8]
    assert found[0].bank().gate_up.is_meta


def test_a_recomposed_router_is_a_router() -> None:
    assert isinstance(blocks(build("qwen3_moe")[0])[0].router, Router)


def test_attention_experts_can_be_masked_but_are_no_bank() -> None:
    model, _ = build("jetmoe")
    assert len(blocks(model)) == 3
    attention = [block for block in blocks(model, attention=True) if "self_attention" in block.name]
    assert len(attention) == 3
    with pytest.raises(UnsupportedModelError, match="attention runs between their two matrices"):
        attention[0].bank()


def test_experts_in_eight_bit_floats_are_refused_as_a_bank() -> None:
    model, _ = build("mixtral")
    block = blocks(model)[0]
    block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="holds its experts as float8_e4m3fn"):
        block.bank()


def test_packed_experts_are_blocks_too() -> None:
    model, inputs = build("qwen3_moe")
    dense = blocks(model)[0]
    x = torch.randn(5, dense.hidden_size)
    routing = replace(dense.choose(x), logits=None)
    expected = dense.run(x, Routing(routing.expert % 4, routing.weight))
    packed = PackedBank.quantise(dense.bank().select([0, 1, 2, 3]), bits=8, group_size=16)
    dense.module.experts = BankExperts.like(dense.experts, packed.describe(), slots=[0, 1, 2, 3] * 2)
    for name, tensor in packed.tensors().items():
        dense.module.experts.get_parameter(name).data.copy_(tensor)

    block = blocks(model)[0]
    assert block.num_experts == 8
    assert block.bank().num_experts == 4
    assert block.hidden_size == dense.hidden_size
    torch.testing.assert_close(block.run(x, routing), expected, atol=0.05, rtol=0.05)
    with torch.no_grad(), block.mask([0, 1, 2, 3]):
        assert torch.isfinite(model(**inputs).logits).all()
    with pytest.raises(PlanError, match="packed experts cannot be written to"):
        block.put(block.bank())
