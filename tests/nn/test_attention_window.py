"""Attention that looks back so far and no farther."""

import pytest
import torch
from wholes import leaks, lives, padding_on_the_left_changes_nothing, tiny, tokens

from moekit.errors import OptionError
from moekit.nn.attention import near

KINDS = {"softmax": {}, "stick-breaking": {"weights": "stick-breaking"}}


def test_what_is_added_to_scores_by_hand() -> None:
    query, key = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 5, 2)  # two keys are from before
    kept = near(None, query, key, 2)[0, 0] == 0
    assert kept.tolist() == [
        [False, True, True, False, False], [False, False, True, True, False], [False, False, False, True, True],
    ]  # fmt: skip
    padded = torch.tensor([[0, 0, 1, 1, 1]])
    assert (near(padded, query, key, 2)[0, 0, 0] == 0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_layer_sees_its_window_and_nothing_else(options: dict, backend: str) -> None:
    model = tiny(attention={"kind": "softmax", "window": 4, **options}, num_hidden_layers=1, feed_forward="nothing")
    model.set_attn_implementation(backend)
    ids, other = tokens(1, 12), tokens(1, 12)
    other[0, 3] = (other[0, 3] + 1) % 40
    with torch.no_grad():
        apart = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 1e-6
    assert apart.tolist() == [3 <= place < 7 for place in range(12)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_window_as_long_as_the_text_is_none(options: dict) -> None:
    plain, wide = (tiny(attention={"kind": "softmax", **options, **more}) for more in ({}, {"window": 12}))
    torch.testing.assert_close(wide(tokens()).logits, plain(tokens()).logits)
    narrow = tiny(attention={"kind": "softmax", **options, "window": 11})
    assert not torch.allclose(narrow(tokens()).logits[:, -1], plain(tokens()).logits[:, -1])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_lives_in_a_model(options: dict, tmp_path) -> None:
    model = lives(tmp_path, attention={"kind": "softmax", "window": 3, **options})
    assert not leaks(model)
    padding_on_the_left_changes_nothing(model)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="window=0 of attention: give 1 token or more, or leave it out to see all"):
        tiny(attention={"kind": "softmax", "window": 0})
