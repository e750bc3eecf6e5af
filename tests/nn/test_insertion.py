"""New experts in a trained model: without them it is the old one, and training them leaves the old ones alone."""

import pytest
import torch
from wholes import tiny, tokens

from moekit.errors import OptionError
from moekit.nn import MoekitForCausalLM, finish_step
from moekit.nn.insertion import inserted

MODULES = {"router": {"score": {"kind": "mlp", "width": 6}, "weigh": {"kind": "scores", "normalise": False}}}
OTHERS = {"others": ["constant", "zero"], "router": {"score": "residual"}, "correction": {"rate": 0.1}}


def without_new(model, count):
    """The model with its new experts barred from every token."""
    for layer in model.model.layers:
        pool = torch.ones(layer.mlp.gate.num_experts, dtype=torch.bool)
        pool[layer.mlp.num_experts - count : layer.mlp.num_experts] = False
        layer.mlp.gate.pool = pool
    return model


def step(model, rate=0.1):
    """One of AdamW with a decay, on everything."""
    ids = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.5)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    finish_step(model)


@pytest.mark.parametrize("fields", [MODULES, OTHERS, {"num_experts": [4, 5]}])
def test_without_its_new_experts_it_is_the_old_model(fields):
    old = tiny(**fields)
    for layer in old.model.layers:
        if layer.mlp.gate.bias is not None:
            layer.mlp.gate.bias += torch.randn(layer.mlp.gate.num_experts) * 0.1
    new = inserted(old, 3)
    assert [layer.mlp.num_experts for layer in new.model.layers] == [n.mlp.num_experts + 3 for n in old.model.layers]
    with torch.no_grad():
        assert not torch.allclose(new(tokens()).logits, old(tokens()).logits, atol=1e-3)
        for layer in without_new(new, 3).model.layers:
            if layer.mlp.gate.scorer._modules.get("map") is not None:
                layer.mlp.gate.scorer.map.weight[:, 4:7] = 0  # new logits reach old choices of the next layer here
        torch.testing.assert_close(new(tokens()).logits, old(tokens()).logits)


@pytest.mark.parametrize("pull", [1.0, 0.25, 0.0])
def test_old_experts_never_move_and_old_rows_as_far_as_they_may(pull):
    old = tiny(**MODULES)
    new = inserted(old, 2, pull=pull)
    free = inserted(old, 2, pull=0.0)
    free.load_state_dict(new.state_dict())
    step(new)
    step(free)
    for was, now, loose in zip(old.model.layers, new.model.layers, free.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(now.mlp.experts, name)[:4], getattr(was.mlp.experts, name))
        start, rows, moved = was.mlp.gate.scorer.weight, now.mlp.gate.scorer.weight, loose.mlp.gate.scorer.weight
        torch.testing.assert_close(rows[:4], moved[:4] + pull * (start - moved[:4]))
        assert torch.equal(rows[4:], moved[4:])
        assert not torch.equal(moved[:4], start)


def test_new_experts_learn():
    new = inserted(tiny(num_experts_per_tok=4), 2)
    before = [layer.mlp.experts.down_proj[4:].clone() for layer in new.model.layers]
    step(new)
    for layer, start in zip(new.model.layers, before, strict=True):
        assert bool((layer.mlp.experts.down_proj[4:] != start).any((1, 2)).all())


def test_saved_it_is_a_model_like_any_other(tmp_path):
    new = inserted(tiny(**MODULES), 2)
    new.save_pretrained(tmp_path)
    again = MoekitForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(again, "held")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, new(tokens()).logits)


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({}, {"count": 0}, "0 experts to insert"),
        ({}, {"count": 1, "pull": 2}, "pull of 2"),
        ({"layers_per_bank": 2}, {"count": 1}, "no place for new experts"),
        ({"num_experts": 16, "router": {"score": "tree"}}, {"count": 2}, "has 15 rows, which are not one for each"),
    ],
)
def test_what_cannot_be(fields, options, said):
    with pytest.raises(OptionError, match=said):
        inserted(tiny(**fields), **options)
