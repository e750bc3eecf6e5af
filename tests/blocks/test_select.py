"""Removing experts: orders, counts everywhere, and every plan the stock format cannot say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import build
from moekit.blocks import blocks, select_experts
from moekit.errors import PlanError


def _keep(model: Any, experts: list[int]) -> dict[str, list[int]]:
    return {block.name: experts for block in blocks(model, attention=True)}


def test_every_count_moves() -> None:
    model, _ = build("longcat_flash")
    select_experts(model, _keep(model, [1, 3, 4, 7]))
    block = blocks(model)[0]
    assert model.config.n_routed_experts == 4
    assert (block.experts.num_routed_experts, block.experts.total_experts) == (4, 8)
    assert block.router_module.classifier.weight.shape[0] == 8, "the four identity experts stay"
    assert block.router_module.classifier.out_features == 8
    assert block.router.num_experts == 8


def test_a_new_order_of_all_experts_changes_nothing_but_the_order() -> None:
    model, inputs = build("qwen3_moe")
    with torch.no_grad():
        before = model(**inputs).logits
        first = blocks(model)[0].bank().gate_up[0].clone()
        select_experts(model, _keep(model, [7, 6, 5, 4, 3, 2, 1, 0]))
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-6, rtol=0)
    assert torch.equal(blocks(model)[0].bank().gate_up[7], first)


def test_what_the_optimiser_sees_stays_trainable() -> None:
    model, inputs = build("olmoe")
    blocks(model)[0].experts.down_proj.requires_grad_(False)
    select_experts(model, _keep(model, [0, 1, 2, 3]))
    experts = blocks(model)[0].experts
    assert experts.gate_up_proj.requires_grad
    assert not experts.down_proj.requires_grad
    model(**inputs).logits.sum().backward()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {0: [0, 1, 8]}, "has no expert 8: name some of 0 to 7"),
        ("mixtral", {0: [0, 1, 1]}, "an expert is named twice"),
        ("mixtral", {0: [0, 1, 2, 3]}, "blocks would keep 3 to 4 experts: the stock format has one count"),
        ("deepseek_v3", {}, r"\[3, 0\] of them would be left"),
        ("deepseek_v4", {}, "by a table that names expert 3, which would be removed"),
        ("doge", {}, "keep the experts i \\* side \\+ j"),
    ],
)
def test_plans_the_stock_format_cannot_say(family: str, change: dict[int, list[int]], message: str) -> None:
    model, _ = build(family)
    keep = _keep(model, [0, 1, 2])
    keep |= {list(keep)[index]: experts for index, experts in change.items()}
    weights = [p.shape for p in model.parameters()]
    with pytest.raises(PlanError, match=message):
        select_experts(model, keep)
    assert [p.shape for p in model.parameters()] == weights, "nothing is touched by a refused plan"


def test_blocks_left_out_and_blocks_that_are_not_there() -> None:
    model, _ = build("jetmoe")
    keep = {block.name: [0, 1, 2] for block in blocks(model)}
    with pytest.raises(PlanError, match=r"no list of experts for model.layers.0.self_attention.experts"):
        select_experts(model, keep)
    with pytest.raises(PlanError, match="the model has no block nowhere"):
        select_experts(model, {"nowhere": [0]})


def test_a_tower_with_counts_of_its_own_may_be_left_out() -> None:
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

    with torch.device("meta"):
        model = Dots3NoteForConditionalGeneration(Dots3NoteConfig(text_config={"num_hidden_layers": 3}))
    before = {block.name: block.num_experts for block in blocks(model)}
    text = [name for name in before if "vision" not in name]
    select_experts(model, {name: list(range(32)) for name in text})
    after = {block.name: block.num_experts for block in blocks(model)}
    assert {after[name] for name in text} == {32}
    assert all(after[name] == count for name, count in before.items() if name not in text)
    assert model.config.text_config.n_routed_experts == 32

    with pytest.raises(PlanError, match="the named blocks have 4 to 64 experts: change one count at a time"):
        select_experts(model, {name: [0, 1, 2] for name in after})


def test_fewer_experts_than_top_k() -> None:
    model, _ = build("mixtral")
    with pytest.raises(PlanError, match="1 experts kept, but every token uses 2"):
        select_experts(model, _keep(model, [4]))


def test_groups_out_of_order_and_different_numbers_of_groups() -> None:
    model, _ = build("deepseek_v3")
    with pytest.raises(PlanError, match="routes by groups of 4: list its experts group by group"):
        select_experts(model, _keep(model, [4, 5, 0, 1]))
    keep = _keep(model, [0, 1, 2, 3])
    keep[list(keep)[1]] = [0, 1, 4, 5]
    with pytest.raises(PlanError, match="blocks would keep 1 and 2 groups"):
        select_experts(model, keep)


def test_groups_too_small_for_top_k() -> None:
    model, _ = build("deepseek_v3", num_experts_per_tok=3)
    with pytest.raises(PlanError, match="a token chooses among 1 groups of 2 experts but uses 3"):
        select_experts(model, _keep(model, [0, 1, 4, 5]))


def test_shared_weights_need_equal_lists() -> None:
    model, _ = build("diffusion_gemma")
    keep = _keep(model, [0, 1, 2, 3])
    keep[next(iter(keep))] = [0, 1, 2, 4]
    with pytest.raises(PlanError, match="share their weights: keep the same experts in both"):
        select_experts(model, keep)
