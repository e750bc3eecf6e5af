"""A text observed in parts, by several processes, is the text observed at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.errors import TextError
from moekit.profile import profile
from moekit.stream import LoadedModel

TEXT = {domain: [lab.text(domain, "calibration", 5000, 1)] for domain in ("prose", "sorting")}


@pytest.fixture(scope="module")
def runner() -> LoadedModel:
    return LoadedModel.load(Checkpoint.open("moekit:mini"), dtype=torch.float32)


def test_parts_merge_to_the_whole(runner: LoadedModel) -> None:
    options = {"sample": 100, "trace": 200, "sequence_length": 256, "held_out": 0.2, "seed": 3}
    whole = profile(runner, TEXT, **options)
    first, second = (profile(runner, TEXT, part=(number, 2), **options) for number in range(2))
    assert 0 < first.num_tokens < whole.num_tokens
    merged = first.merge(second)
    assert merged.num_tokens == whole.num_tokens
    assert {d: [p.tolist() for p in pieces] for d, pieces in merged.held_out.items()} == {
        d: [p.tolist() for p in pieces] for d, pieces in whole.held_out.items()
    }
    for name, layer in whole.layers.items():
        for statistic, array in layer.arrays.items():
            found = merged.layers[name].arrays[statistic]
            if statistic in ("counts", "tokens", "hidden", "sample_expert", "sample_weight", "coactivation"):
                assert np.array_equal(found, array), statistic
            else:
                np.testing.assert_allclose(found, array, rtol=1e-9, atol=1e-12, err_msg=statistic)


def test_too_little_text_for_the_parts(runner: LoadedModel) -> None:
    with pytest.raises(TextError, match="the text makes 1 batches, too few for 2 parts"):
        profile(runner, {"a": ["a few words"]}, held_out=0, part=(0, 2))
