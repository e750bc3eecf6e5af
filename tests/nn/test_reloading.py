"""A loaded model has every buffer of the model that was saved, also those that no file holds."""

import pytest
import torch
from wholes import tiny, tokens

from moekit.nn import MoekitForCausalLM

ACCUMULATED = {"balance": {"load": {"weight": 0.01, "scope": "accumulated"}}}
FIELDS = {
    "accumulated": ACCUMULATED,
    "corrected": {"correction": {"update": "proportional"}},
    "chained": {"wiring": {"kind": "chain", "passes": 2}, **ACCUMULATED},
    "costs": {"router": {"activation": "noisy-softmax"}, "balance": {"cost": {"weight": 1.0, "costs": [6, 6, 4, 4]}}},
    "hash": {"router": {"score": "hash"}},
    "subspace": {"experts": "subspace", "balance": {"conflict": 1.0}},
    "tree": {"router": {"score": {"kind": "tree", "permute": "each"}, "select": "support"}},
}


@pytest.fixture
def marked_memory():
    """Memory that nobody has written to holds no zeros by chance, but NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_buffers_and_the_first_loss_are_those_of_the_saved_model(fields: dict, marked_memory, tmp_path) -> None:
    model = tiny(**fields)
    model.save_pretrained(tmp_path)
    again = MoekitForCausalLM.from_pretrained(tmp_path)
    buffers = dict(model.named_buffers())
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    losses = []
    for each in (model, again):
        torch.manual_seed(0)
        losses.append(each.train()(tokens(), labels=tokens()).loss)
    assert torch.equal(*losses)
