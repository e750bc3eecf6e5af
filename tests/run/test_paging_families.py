"""Paged from disk, one expert in memory at a time, a model computes the bits it computes with all of them there."""

import miniatures
import pytest
import torch

import families
from moekit.checkpoint import Checkpoint
from moekit.errors import UnsupportedModelError
from moekit.run.paging import load, paging
from moekit.stream import LoadedModel

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
    store.resize(max(layer.charge for layer in store.layers))
    return store


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in UNPAGEABLE])
def test_bit_for_bit_with_one_expert_in_memory(family, tmp_path):
    model, inputs = families.build(family)
    model.save_pretrained(tmp_path)
    resident = LoadedModel.load(Checkpoint.open(tmp_path)).model
    resident.set_experts_implementation("moekit")
    paged = load(tmp_path)
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


@pytest.mark.parametrize("layout", [name for name in miniatures.LAYOUTS if name != "moekit"])
def test_every_published_layout(layout, tmp_path):
    miniatures.write(layout, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    resident = LoadedModel.load(checkpoint).model
    resident.set_experts_implementation("moekit")
    inputs = {"input_ids": torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))}
    paged = load(checkpoint)
    squeeze(paged)
    assert torch.equal(logits(paged, inputs), logits(resident, inputs))
    paging(paged).close()
