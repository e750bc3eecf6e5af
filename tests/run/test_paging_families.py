"""Paged from disk, one expert in memory at a time, a model computes the bits it computes with all of them there."""

import dataclasses

import miniatures
import pytest
import torch

import families
from moekit.checkpoint import Checkpoint
from moekit.errors import UnsupportedModelError
from moekit.run.paging import load, paging
from moekit.stream import LoadedModel
from moekit.train.recipe import Recipe

UNPAGEABLE = {
    *("dbrx", "doge", "jetmoe", "llama4", "switch_transformers", "longcat_flash", "step3p7"),  # not stacked as usual
    "diffusion_gemma",  # two modules share one set of experts
    "nllb_moe",  # not supported at all
}


def logits(model, inputs):
    with torch.no_grad():
        torch.manual_seed(7)
        output = model(**inputs, use_cache=False)
        return output.logits if getattr(output, "logits", None) is not None else output[0]


def squeeze(model):
    """Room for a single expert."""
    store = paging(model).store
    store.resize(max(max(layer.charge) for layer in store.layers))
    return store


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in UNPAGEABLE])
def test_bit_for_bit_with_one_expert_in_memory(family, tmp_path):
    model, inputs = families.build(family)
    model.save_pretrained(tmp_path)
    one_at_a_time(tmp_path, inputs)


@pytest.mark.parametrize("key", ["house", "moge", "comet-gate", "chain-of-experts", "rexmoe"])
def test_architectures_of_recipes_too(key, tmp_path):
    torch.manual_seed(0)
    Recipe.read(key).build().save_pretrained(tmp_path)
    one_at_a_time(tmp_path, {"input_ids": torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))})


def one_at_a_time(folder, inputs):
    """Experts of a checkpoint paged, all of them there and then a single one, compared with those in memory."""
    resident = LoadedModel.load(Checkpoint.open(folder)).model
    resident.set_experts_implementation("moekit")
    paged = load(folder)
    expected = logits(resident, inputs)
    assert torch.equal(logits(paged, inputs), expected)
    store = squeeze(paged)
    assert torch.equal(logits(paged, inputs), expected)
    assert len(store.resident()) == 1
    assert store.counters.misses > 0
    paging(paged).close()


@pytest.mark.parametrize("family", sorted(UNPAGEABLE))
def test_what_cannot_be_paged_says_so(family, tmp_path):
    model, _ = families.build(family)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"paged one by one|not supported|no experts of its own"):
        load(tmp_path)


@pytest.mark.parametrize("layout", miniatures.LAYOUTS)
def test_every_published_layout(layout, tmp_path):
    miniatures.write(layout, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    resident = LoadedModel.load(checkpoint).model
    if layout != "moekit":  # whose experts always run on moekit's kernels
        resident.set_experts_implementation("moekit")
    inputs = {"input_ids": torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))}
    paged = load(checkpoint)
    squeeze(paged)
    assert torch.equal(logits(paged, inputs), logits(resident, inputs))
    paging(paged).close()


@pytest.mark.parametrize("bits", ["8", "2+3+4+8"])
def test_packed_experts_of_several_widths(bits, tmp_path):
    from moekit.compress import sequence
    from moekit.plan import apply, make_plan

    widths = [int(b) for b in bits.split("+")]
    miniatures.plain(tmp_path / "plain")
    source = Checkpoint.open(tmp_path / "plain")
    plan = make_plan(sequence([f"rtn:bits={widths[0]}"]), source, None, None)
    if len(widths) > 1:
        layers = {name: layer.with_bits([widths[i % 4] for i in range(8)]) for name, layer in plan.layers.items()}
        plan = dataclasses.replace(plan, layers=layers)
    apply(source, plan, tmp_path / "packed", format="moekit")
    checkpoint = Checkpoint.open(tmp_path / "packed")
    inputs = {"input_ids": torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))}
    expected = logits(LoadedModel.load(checkpoint).model, inputs)
    paged = load(checkpoint)
    assert torch.equal(logits(paged, inputs), expected)
    squeeze(paged)
    assert torch.equal(logits(paged, inputs), expected)
    paging(paged).close()
