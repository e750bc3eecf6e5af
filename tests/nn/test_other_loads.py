"""Loads of routers that are no MoE layer's: told apart from those of layers, and without padding."""

import pytest
import torch
from wholes import tiny, tokens

KINDS = {
    "heads": ({"kind": "heads", "k": 1, "shared": 2}, 2, 1),
    "experts": ({"kind": "experts", "experts": 3, "k": 2}, 3, 2),
    "selected": ({"kind": "selected", "k": 3}, 4, 3),
    "in a sum": ({"kind": "sum", "of": [{"kind": "heads", "k": 2}, "state-space"], "gates": [1.0, 1.0]}, 4, 2),
}


@pytest.mark.parametrize(("attention", "choices", "k"), KINDS.values(), ids=KINDS)
def test_attention_tells_its_loads_apart(attention: dict, choices: int, k: int) -> None:
    model = tiny(attention=attention, num_attention_heads=4)
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    for out in (model(tokens(), attention_mask=mask), model.model(tokens(), attention_mask=mask)):
        assert list(out.other_load) == ["attention"]
        assert [len(load) for load in out.other_load["attention"]] == [choices] * 2
        assert [int(load.sum()) for load in out.other_load["attention"]] == [19 * k] * 2
        assert [len(load) for load in out.expert_load] == [4, 4]


def test_they_are_those_of_one_pass_whatever_is_recomputed() -> None:
    model = tiny(attention=KINDS["heads"][0], num_attention_heads=4).train()
    model.gradient_checkpointing_enable()
    for _ in range(2):
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        assert [int(load.sum()) for load in out.other_load["attention"]] == [24, 24]


def test_a_memory_may_be_an_moe_layer_and_is_asked_what_it_needs() -> None:
    model = tiny(feed_forward="nothing", memory="moe", router={"granularity": {"kind": "chunk", "length": 4}})
    out = model(tokens())
    assert out.expert_load == ()
    assert [int(load.sum()) for load in out.other_load["memory"]] == [48, 48]
    assert not model.model.can_cache  # though no layer needs more than keys and values


def test_a_plain_model_has_none() -> None:
    assert tiny()(tokens()).other_load == {}
