"""Models of recipes read every text by itself: no padding, no neighbour, nothing later; half precision stays finite."""

import pytest
import torch

from moekit.train.recipe import Recipe

KEYS = [
    "momentum-smoe", "chain-of-experts", "moh", "union-of-experts", "rexmoe", "sortednet", "evomoe", "dynamoe",
    "erc-loss", "ssr", "rmoe", "hecto",
]  # fmt: skip
SMALL = {"hidden_size": 32, "moe_intermediate_size": 8, "initializer_range": 0.2}
PAD, LENGTH, SHORT = 258, 9, 6


@pytest.mark.parametrize("key", KEYS)
def test_a_text_is_read_as_if_alone_and_by_what_came_before(key):
    recipe = Recipe.read(key).with_model(**SMALL)
    model = recipe.build(0).train()
    other, ids = torch.randint(0, 256, (2, 2, LENGTH), generator=torch.Generator().manual_seed(1))
    model(other, labels=other).loss.backward()  # some parts learn by it what they use afterwards
    model.eval()
    padded = ids.clone()
    padded[0, : LENGTH - SHORT] = PAD
    mask = (padded != PAD).long()
    changed = torch.cat((ids[:, :SHORT], (ids[:, SHORT:] + 7) % 256), dim=1)
    near = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        together = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(together[0, -SHORT:], model(ids[:1, -SHORT:]).logits[0], **near)
        torch.testing.assert_close(together[1], model(ids[1:]).logits[0], **near)
        torch.testing.assert_close(model(ids).logits[:, :SHORT], model(changed).logits[:, :SHORT], **near)
        assert recipe.build(0).to(torch.float16).eval()(ids).logits.isfinite().all()
    run = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))
