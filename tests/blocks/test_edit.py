"""Editing, masking and observing a live block: composition, removal, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from families import build
from moekit.blocks import Observation, blocks
from moekit.contract import PAD, Context, RouterEdit
from moekit.errors import PlanError


@pytest.fixture(scope="module")
def tiny() -> tuple:
    model, inputs = build("mixtral")
    with torch.no_grad():
        return model, inputs, blocks(model), model(**inputs).logits


def _run(tiny: tuple, index: int = 0) -> Observation:
    model, inputs, found, _ = tiny
    seen: list[Observation] = []
    with torch.no_grad(), found[index].observe(seen.append):
        model(**inputs)
    return seen[0]


def test_edits_add_up_and_leave_no_trace(tiny: tuple) -> None:
    model, inputs, found, logits = tiny
    first, second = found[0].mask([0, 1, 2, 3, 4, 5]), found[0].mask([2, 3, 4, 5, 6, 7])
    with first, second:
        assert set(_run(tiny).routing.expert.unique().tolist()) <= {2, 3, 4, 5}
    handle = found[0].mask([6, 7]).attach()
    assert set(_run(tiny).routing.expert.unique().tolist()) == {6, 7}
    handle.remove()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_a_mask_below_top_k_leaves_slots_unused(tiny: tuple) -> None:
    with tiny[2][0].mask([3]):
        routing = _run(tiny).routing
    assert bool((routing.used.sum(1) == 1).all())
    torch.testing.assert_close(routing.dense(8)[:, 3], torch.ones(len(routing.expert)))


def test_a_dropped_slot_gives_its_weight_to_the_others(tiny: tuple) -> None:
    def first_only(expert: Tensor, _: Context) -> Tensor:
        return torch.cat([expert[:, :1], torch.full_like(expert[:, 1:], PAD)], dim=1)

    with tiny[2][0].edit(RouterEdit(after_select=first_only)):
        weight = _run(tiny).routing.dense(8)
    torch.testing.assert_close(weight.max(dim=1).values, torch.ones(len(weight)))


def test_more_slots_than_the_family_uses(tiny: tuple) -> None:
    everyone = RouterEdit(after_select=lambda expert, _: torch.arange(8).expand(len(expert), 8))
    with tiny[2][0].edit(everyone):
        seen = _run(tiny)
    assert bool(seen.routing.used.all())
    torch.testing.assert_close(seen.routing.dense(8), seen.routing.logits.softmax(1))


def test_the_residual_is_what_entered_the_norm(tiny: tuple) -> None:
    norm = tiny[0].model.layers[1].post_attention_layernorm
    inner: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, args, output: inner.append(args[0]))
    seen = _run(tiny, 1)
    hook.remove()
    assert seen.residual_TH is not None
    assert torch.equal(seen.residual_TH, inner[0].reshape(-1, 32))
    torch.testing.assert_close(norm(seen.residual_TH), seen.x_TH)
    assert seen.layer == 1


def test_where_norms_come_after_the_residual_is_the_input_itself() -> None:
    model, inputs = build("flex_olmo")
    seen: list[Observation] = []
    with torch.no_grad(), blocks(model)[0].observe(seen.append):
        model(**inputs)
    assert torch.equal(seen[0].residual_TH, seen[0].x_TH)


def test_backward_flows_through_an_edit(tiny: tuple) -> None:
    model, inputs, found, _ = tiny
    with found[0].edit(RouterEdit(after_score=lambda logits, _: logits * 0.5)):
        model(**inputs).logits.sum().backward()
    gradient = found[0].router_module.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    model.zero_grad()


def test_masks_that_make_no_sense_are_refused(tiny: tuple) -> None:
    with pytest.raises(PlanError, match=r"has no expert 8: name at least one of 0 to 7"):
        tiny[2][0].mask([0, 8])
    with pytest.raises(PlanError, match="has nothing left when all experts are masked"):
        tiny[2][0].mask([])


def test_a_bank_of_another_shape_is_refused(tiny: tuple) -> None:
    bank = tiny[2][0].bank()
    with pytest.raises(PlanError, match=r"the bank's gate_up is \[3, 96, 32\], but this block holds \[8, 96, 32\]"):
        tiny[2][0].put(bank.select([0, 1, 2]))


def test_the_bank_is_a_view_where_the_layout_allows(tiny: tuple) -> None:
    block = tiny[2][0]
    assert block.bank().gate_up.data_ptr() == block.experts.gate_up_proj.data_ptr()
