"""Every MoE family of the installed transformers: what blocks() says of it is what it does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, build
from moekit.blocks import UNSUPPORTED, MoEBlock, Observation, blocks, select_experts
from moekit.contract import Context, RouterEdit, Routing, route
from moekit.formats import DenseBank

SUPPORTED = [family for family in FAMILIES if family not in UNSUPPORTED]


class Family:
    """One tiny model, its inputs, its untouched logits, and what was observed while they were computed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.inputs = build(name)
        self.blocks = blocks(self.model)
        self.seen, self.routed, self.logits = self.run()
        self.called = [block for block in self.blocks if block.name in self.seen]

    @torch.no_grad()
    def run(self) -> tuple[dict[str, Observation], dict[str, Tensor], Tensor]:
        """Observations and what the experts really returned, by block, and the logits."""
        seen: dict[str, Observation] = {}
        routed: dict[str, Tensor] = {}

        def keep(observation: Observation) -> None:
            seen[observation.block.name] = observation

        handles = [block.observe(keep).attach() for block in self.blocks]
        handles += [_watch_output(block, routed) for block in self.blocks]
        logits = self.model(**self.inputs).logits
        for handle in handles:
            handle.remove()
        return seen, routed, logits


def _watch_output(block: MoEBlock, into: dict[str, Tensor]) -> Any:
    """What the experts added, from the family's own output: independent of how moekit reads the routing."""
    if block.experts is not block.module and not block.layout.weights_on_input:
        return block.experts.register_forward_hook(
            lambda module, args, output: into.__setitem__(block.name, output.reshape(-1, output.shape[-1]))
        )

    def of_block(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden, x = hidden.reshape(-1, hidden.shape[-1]), args[0].reshape(-1, args[0].shape[-1])
        if hasattr(module, "shared_expert"):  # llama4
            hidden = hidden - module.shared_expert(x)
        elif hasattr(module, "bias"):  # jetmoe
            hidden = hidden - module.bias
        else:  # doge
            hidden = hidden - module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
        into[block.name] = hidden

    return block.module.register_forward_hook(of_block)


@pytest.fixture(scope="module", params=SUPPORTED)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def _moe_layers(family: Family) -> int:
    """How many MoE blocks the configuration says there are."""
    config = family.model.config
    text = config.get_text_config(decoder=True)
    if family.name == "switch_transformers":
        return text.num_sparse_encoder_layers + text.num_sparse_decoder_layers
    layers, fields = text.num_hidden_layers, text.to_dict()
    sparse = ("sparse", "moe", "hash_moe")
    if family.name == "longcat_flash":
        return text.num_layers
    if family.name == "nemotron_h":
        return text.layers_block_type.count("moe")
    if "expert_layer_period" in fields:
        return sum(i % text.expert_layer_period == text.expert_layer_offset for i in range(layers))
    if fields.get("mlp_layer_types"):
        found = sum(kind in sparse for kind in text.mlp_layer_types)
    elif fields.get("mlp_only_layers"):
        found = layers - len(text.mlp_only_layers)
    else:
        starts = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
        found = layers - next((fields[start] for start in starts if start in fields), 0)
    pairs = ("ernie4_5_vl_moe", "diffusion_gemma")  # text and vision experts; encoder and decoder
    return found * (2 if family.name in pairs else 1)


def _num_experts(config: Any) -> int:
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in ("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    raise AssertionError("the configuration names no number of experts")


def test_counts_equal_the_configuration(family: Family) -> None:
    assert len(family.blocks) == _moe_layers(family)
    assert {block.num_experts for block in family.blocks} == {_num_experts(family.model.config)}
    assert len({block.name for block in family.blocks}) == len(family.blocks)
    assert len(family.called) >= 2
    assert all(block.bank().num_experts == block.num_experts for block in family.blocks)
    assert all(block.bank().hidden_size == block.hidden_size for block in family.blocks)


def test_routing_read_off_and_recomposed_are_the_familys_own(family: Family) -> None:
    for block in family.called:
        seen = family.seen[block.name]
        assert seen.routing.counts(block.num_experts).count_nonzero() >= 3, "the choices are trivial"
        expected = family.routed[block.name] - _identities(block, seen)
        torch.testing.assert_close(seen.routed_TH, expected, atol=1e-5, rtol=1e-4)
        recomposed = route(block.router, seen.router_TH, seen.context)
        assert _difference(_experts_only(block, recomposed), seen.routing, block) <= 1e-6
        assert seen.routing.logits is not None
        assert seen.routing.logits.shape[1] == block.num_experts


def test_an_edit_after_each_stage_has_exactly_its_effect(family: Family) -> None:
    for block in family.called[:2]:
        seen, count = family.seen[block.name], block.num_experts
        shift = torch.linspace(-1.0, 1.0, count).flip(0)
        busiest = int(seen.routing.counts(count).argmax())

        moved = RouterEdit(after_score=lambda logits, _: logits + _padded(shift, logits))  # noqa: B023
        after, _ = _edited(family, block, moved)
        assert _difference(after.routing, seen.routing, block) > 1e-3
        expected = route(block.router, after.router_TH, after.context, moved)
        assert _difference(after.routing, _experts_only(block, expected), block) <= 1e-6

        bias = torch.zeros(count).index_fill(0, torch.tensor([busiest]), -math.inf)
        after, _ = _edited(family, block, RouterEdit(selection_bias=bias))
        assert after.routing.counts(count)[busiest] == 0
        assert after.routing.used.sum() > 0

        def turn(expert: Tensor, _: Context) -> Tensor:
            return torch.where(expert >= 0, (expert + 1) % count, expert)  # noqa: B023

        after, _ = _edited(family, block, RouterEdit(after_select=turn))
        chosen = block.router.select(block.router.score(after.router_TH, after.context), after.context)
        wanted = turn(chosen, after.context)
        weighed = after.routing.weight != 0
        assert torch.equal(_sorted(after.routing.expert.where(weighed, -1)), _sorted(wanted.where(weighed, -1)))


def test_a_weight_of_zero_removes_the_expert(family: Family) -> None:
    block = family.called[0]
    busiest = int(family.seen[block.name].routing.counts(block.num_experts).argmax())

    def drop(routing: Routing, _: Context) -> Routing:
        return routing.with_weight(routing.weight.masked_fill(routing.expert == busiest, 0))

    shares = [other for other in family.called if _weights(other) == _weights(block)]
    edits = [other.edit(RouterEdit(after_weigh=drop)).attach() for other in shares]
    _, _, logits = family.run()
    for edit in edits:
        edit.remove()
    bank = block.bank()
    assert isinstance(bank, DenseBank)
    original = {name: tensor.detach().clone() for name, tensor in bank.tensors().items()}
    silent = {n: t.clone().index_fill(0, torch.tensor([busiest]), 0) for n, t in original.items() if "down" in n}
    block.put(replace(bank, **(original | silent)))
    _, _, expected = family.run()
    block.put(replace(bank, **original))
    assert (expected - family.logits).abs().max() > 1e-4
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_bank_out_and_put_back_leaves_the_logits_bit_identical(family: Family) -> None:
    copies = []
    for block in family.blocks:
        bank = block.bank()
        assert isinstance(bank, DenseBank)
        copies.append(replace(bank, **{name: tensor.detach().clone() for name, tensor in bank.tensors().items()}))
    for block, bank in zip(family.blocks, copies, strict=True):
        block.put(replace(bank, **{name: torch.randn_like(tensor) for name, tensor in bank.tensors().items()}))
    assert not torch.equal(family.run()[2], family.logits)
    for block, bank in zip(family.blocks, copies, strict=True):
        block.put(bank)
    assert torch.equal(family.run()[2], family.logits)


@pytest.mark.parametrize("whole_groups", [False, True], ids=["some", "whole_groups"])
def test_selected_saved_and_reloaded_equals_masked_live(family: Family, whole_groups: bool, tmp_path: Any) -> None:
    if whole_groups and not any(block.groups for block in family.blocks):
        pytest.skip("not routed by groups")
    model, inputs = build(family.name)
    found = blocks(model, attention=True)
    keep = {block.name: _subset(block, index, whole_groups) for index, block in enumerate(found)}
    edits = [block.mask(keep[block.name]).attach() for block in found]
    with torch.no_grad():
        masked = model(**inputs).logits
    for edit in edits:
        edit.remove()
    assert (masked - family.logits).abs().max() > 1e-4

    select_experts(model, keep)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    assert {block.num_experts for block in blocks(again)} == {len(next(iter(keep.values())))}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, masked, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.eval()(**inputs).logits, masked, atol=1e-5, rtol=0)


def _subset(block: MoEBlock, index: int, whole_groups: bool) -> list[int]:
    """A different subset in each block, as irregular as its routing allows."""
    count = block.num_experts
    if block.router.inline:  # product keys: a square
        keys = [0, 2, 3] if index % 2 else [0, 1, 3]
        return [i * math.isqrt(count) + j for i in keys for j in keys]
    if hasattr(block.router_module, "tid2eid"):
        return [0, 1, 2, 3, 4, 6]  # all that the token table names
    if block.groups is not None:
        groups = torch.arange(count).view(block.groups[0], -1)
        return groups[index % 2].tolist() if whole_groups else groups[:, [0, 2, 3]].flatten().tolist()
    seed = 0 if "encoder" in block.name or "decoder" in block.name else index
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:6].tolist())


def _edited(family: Family, block: MoEBlock, edit: RouterEdit) -> tuple[Observation, Tensor]:
    with block.edit(edit):
        seen, _, logits = family.run()
    return seen[block.name], logits


def _weights(block: MoEBlock) -> int:
    """Blocks with equal numbers share their experts' weights."""
    return id(next(block.experts.parameters()))


def _padded(shift: Tensor, logits: Tensor) -> Tensor:
    return torch.nn.functional.pad(shift, (0, logits.shape[-1] - len(shift)))


def _sorted(expert: Tensor) -> Tensor:
    return expert.sort(dim=1).values


def _experts_only(block: MoEBlock, routing: Routing) -> Routing:
    """Without classes beyond the experts."""
    used = (routing.expert >= 0) & (routing.expert < block.num_experts)
    return replace(routing, expert=routing.expert.where(used, -1), weight=routing.weight.where(used, 0))


def _identities(block: MoEBlock, seen: Observation) -> Tensor:
    """What identity experts add (longcat_flash): the input times their weight."""
    routing = route(block.router, seen.router_TH, seen.context)
    beyond = routing.expert >= block.num_experts
    return seen.x_TH * routing.weight.where(beyond, 0).sum(1, keepdim=True)


def _difference(one: Routing, other: Routing, block: MoEBlock) -> float:
    return float((one.dense(block.num_experts) - other.dense(block.num_experts)).detach().abs().max())
