"""Projections that each modality has of its own tell how many tokens used them."""

import torch
from wholes import tiny, tokens

OWN = {"kind": "state-space", "state": 4, "modalities": 2}


def test_tokens_of_each_modality_are_counted_without_padding() -> None:
    mask, ids = torch.tensor([[0] * 5 + [1] * 7, [1] * 12]), tokens()
    labels = (ids > 20).long()
    out = tiny(attention=OWN)(ids, attention_mask=mask, modality_ids=labels)
    expected = torch.bincount(labels[mask.bool()], minlength=2)
    assert [load.tolist() for load in out.other_load["attention"]] == [expected.tolist()] * 2
    assert not tiny(attention={"kind": "state-space", "state": 4})(ids).other_load  # one kind of projections, no choice
