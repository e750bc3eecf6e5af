"""Every family of the installed transformers: what is read from disk is what the loaded model holds."""

import pytest
import torch

import families
from moekit.blocks import UNSUPPORTED, blocks
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.skeleton import grown
from moekit.errors import UnsupportedModelError

NUM_EXPERTS = families.NUM_EXPERTS
ATTENTION_EXPERTS, PRODUCT_KEYS = "jetmoe", "doge"
TIED_COPIES = "diffusion_gemma"
"""Its encoder shares every weight with its decoder, so that only the decoder's layers are on disk."""


@pytest.fixture(scope="module", params=[family for family in families.FAMILIES if family not in UNSUPPORTED])
def saved(request, tmp_path_factory):
    model, _ = families.build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, Checkpoint.open(folder)


def test_layers_are_the_live_blocks(saved):
    family, model, checkpoint = saved
    live = {block.name: block for block in blocks(model)}
    found = {layer.name: layer for layer in checkpoint.moe_layers}
    assert set(found) == set(live) if family != TIED_COPIES else set(found) < set(live)
    for name, layer in found.items():
        block = live[name]
        assert (layer.layer, layer.num_experts, layer.top_k) == (block.layer, block.num_experts, block.top_k)
        assert layer.groups == block.groups
        assert not layer.extra


def test_banks_equal_the_live_ones_and_go_back_bit_for_bit(saved):
    _, model, checkpoint = saved
    live = {block.name: block for block in blocks(model)}
    for layer in checkpoint.moe_layers:
        want, got = live[layer.name].bank(), checkpoint.bank(layer.name)
        assert want.tensors().keys() == got.tensors().keys()
        for name, tensor in want.tensors().items():
            assert torch.equal(tensor, got.tensors()[name]), name
        rows = torch.randn(3, want.gate_up.shape[1])
        assert torch.equal(want.activation(rows), got.activation(rows))
        back = checkpoint.write_bank(layer.name, got)
        assert back.keys() == {tensor.name for tensor in layer.expert_tensors}
        assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in back.items())


def test_shared_experts_are_listed(saved):
    _, model, checkpoint = saved
    live = {block.name: block for block in blocks(model)}
    paths = {id(module): path for path, module in model.named_modules()}
    parameters = checkpoint.classified.parameters
    listed = {parameters[name] for layer in checkpoint.moe_layers for name in layer.shared}
    expected = {
        f"{paths[id(module)]}.{name}"
        for layer in checkpoint.moe_layers
        for module in live[layer.name].shared
        for name, _ in module.named_parameters()
        if "shared" in paths[id(module)]
    }
    assert expected <= listed


def test_a_subset_is_a_selection_and_reads_no_more(saved):
    _, _, checkpoint = saved
    layer = checkpoint.moe_layers[-1]
    whole = checkpoint.bank(layer.name)
    before = checkpoint.counted_bytes
    some = checkpoint.bank(layer.name, [5, 1])
    assert checkpoint.counted_bytes - before == some.nbytes
    for name, tensor in whole.select([5, 1]).tensors().items():
        assert torch.equal(tensor, some.tensors()[name])
    before = checkpoint.counted_bytes
    expert = checkpoint.read_expert(layer.name, 5)
    assert checkpoint.counted_bytes - before == sum(t.nbytes for t in expert.values()) == some.nbytes // 2


def test_row_tensors_have_a_row_per_expert(saved):
    family, _, checkpoint = saved
    for layer in checkpoint.moe_layers:
        for row in layer.row_tensors:
            assert row.rows == layer.num_experts <= checkpoint.tensors[row.name].shape[row.axis]
        assert bool(layer.row_tensors) == (family != PRODUCT_KEYS)


def test_more_experts_change_exactly_the_tensors_it_names(saved, tmp_path):
    """Save the same model with more experts: on disk only row tensors and expert tensors may differ, as described."""
    family, model, checkpoint = saved
    if checkpoint.fixed_count:
        assert family in (ATTENTION_EXPERTS, PRODUCT_KEYS)
        return
    config, step = grown(model.config)
    type(model)(config).save_pretrained(tmp_path)
    larger = Checkpoint.open(tmp_path).tensors
    rows = {row.name: row.axis for layer in checkpoint.moe_layers for row in layer.row_tensors}
    experts = {t.name: t for layer in checkpoint.moe_layers for t in layer.expert_tensors}
    for name, info in checkpoint.tensors.items():
        expected = list(info.shape)
        if name in rows:
            expected[rows[name]] += step
        elif name in experts and experts[name].expert is None:
            expected[0] += step * experts[name].rows
        elif name in experts:
            name = checkpoint.rename_expert(name, experts[name].expert, experts[name].run and NUM_EXPERTS + step)
        assert list(larger[name].shape) == expected, name
    new = {
        checkpoint.rename_expert(n, NUM_EXPERTS + i)
        for n, t in experts.items()
        if t.expert is not None
        for i in range(step)
    }
    assert len(new - larger.keys()) == 0


def test_summary_counts_every_parameter(saved):
    _, model, checkpoint = saved
    summary = checkpoint.summary()
    assert summary.total == sum(parameter.numel() for parameter in model.parameters())
    assert summary.total_bytes == sum(info.nbytes for info in checkpoint.tensors.values())
    assert 0 < summary.active < summary.total
    experts = sum(layer.num_experts * layer.expert_bytes for layer in summary.layers)
    assert summary.nbytes["experts"] == experts
    assert summary.nbytes["extra"] == 0


def test_skeleton_has_the_class_and_shapes_of_the_model(saved):
    _, model, checkpoint = saved
    skeleton = checkpoint.skeleton()
    assert type(skeleton) is type(model)
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) & set(UNSUPPORTED)))
def test_unsupported_families_say_so(family, tmp_path):
    try:
        model, _ = families.build(family)
    except RuntimeError:
        pytest.skip("cannot be built tiny")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(UnsupportedModelError, match=family):
        checkpoint.bank(checkpoint.moe_layers[0].name)


@pytest.mark.parametrize("family", [ATTENTION_EXPERTS, PRODUCT_KEYS])
def test_a_fixed_count_is_said(family, tmp_path):
    families.build(family)[0].save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).fixed_count
