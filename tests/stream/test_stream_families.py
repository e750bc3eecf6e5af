"""Layer by layer from disk gives the bits that the model in memory gives, for every family there is."""

import pytest
import torch

import families
from moekit.checkpoint import Checkpoint
from moekit.stream import LoadedModel, StreamedModel

UNPADDED = {
    "qwen3_omni_moe": "its thinker looks up positions with a field its configuration lacks once there is a mask"
}
"""Family -> why it is compared without the padded batch."""
NOISY = {"diffusion_gemma": "samples the noise it starts from in its own forward"}
"""Family -> why its batches run one at a time, each from the same seed."""


def batches(inputs):
    """Two plain batches and a left-padded one of another length."""
    other = {name: value.flip(1) for name, value in inputs.items()}
    padded = {name: value[:, 2:].clone() for name, value in inputs.items()}
    mask = torch.ones_like(padded["input_ids"])
    mask[0, :3] = 0
    return [inputs, other, {**padded, "attention_mask": mask}]


def reference(model, every):
    with torch.no_grad():
        for batch in every:
            torch.manual_seed(7)
            output = model(**batch, use_cache=False)
            yield output.logits if getattr(output, "logits", None) is not None else output[0]


def alone(runner, every):
    """One batch at a time, for families that draw noise while they run."""
    for batch in every:
        torch.manual_seed(7)
        yield from runner.forward([batch])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_streamed_equals_in_memory_bit_for_bit(family, tmp_path):
    model, inputs = families.build(family)
    every = batches(inputs)[: 2 if family in UNPADDED else 3]
    expected = list(reference(model, every))
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(Checkpoint.open(tmp_path))
    assert len(streamed.layers) >= 2
    noisy = family in NOISY
    found = list(alone(streamed, every) if noisy else streamed.forward(every))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    again = list(alone(streamed, every) if noisy else streamed.forward(every))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    held = [key for key, tensor in streamed.model.state_dict().items() if not tensor.is_meta]
    assert held == [], "weights stayed resident after the pass"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "cohere2_moe", "deepseek_v3"])
def test_loading_whole_gives_the_same_bits_too(family, tmp_path):
    model, inputs = families.build(family)
    model.save_pretrained(tmp_path)
    loaded = LoadedModel.load(Checkpoint.open(tmp_path))
    assert torch.equal(next(reference(model, [inputs])), next(loaded.forward([inputs])))
