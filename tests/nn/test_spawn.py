"""Experts that begin as one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.errors import OptionError
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.nn.experts import FeedForward
from moekit.nn.moment import Moment
from moekit.nn.schedule import Schedule

SIZES = {"vocab_size": 40, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 4, "num_hidden_layers": 2}
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))


def model(masked=0.25):
    torch.manual_seed(0)
    bank = {"kind": "spawning", "masked": masked}
    return MoekitForCausalLM(MoekitConfig(**SIZES, num_attention_heads=2, experts=bank)).eval()


def alone(lm, value):
    for layer in lm.model.layers:
        layer.mlp.experts.alone = value


def test_alone_it_is_one_feed_forward_for_every_token():
    experts = model().model.layers[0].mlp.experts
    plain = FeedForward(8, 6)
    plain.gate_proj.weight.data, plain.up_proj.weight.data = experts.gate_up_proj[0].data.chunk(2)
    plain.down_proj.weight.data = experts.down_proj[0].data
    x = torch.randn(5, 8)
    ids, weights = torch.tensor([[0, 3], [1, 2], [2, 4], [4, 4], [3, 0]]), torch.rand(5, 2)
    experts.alone = True
    torch.testing.assert_close(experts(x, ids, weights), plain(x))
    experts._alone = False
    assert not torch.allclose(experts(x, ids, weights), plain(x))


def test_only_the_first_expert_learns_while_alone():
    lm = model().train()
    alone(lm, True)
    lm(IDS, labels=IDS).loss.backward()
    for layer in lm.model.layers:
        grad = layer.mlp.experts.down_proj.grad
        assert grad[0].any()
        assert not grad[1:].any()


def test_spawned_experts_are_copies_each_with_other_weights_masked():
    lm = model(masked=0.25)
    before = {name: p.clone() for name, p in lm.named_parameters() if "experts" in name}
    alone(lm, True)
    alone(lm, False)
    masks = []
    for name, now in lm.named_parameters():
        if "experts" not in name:
            continue
        one = before[name][0]
        for expert in now:
            assert int((expert == 0).sum()) == round(0.25 * one.numel())
            torch.testing.assert_close(expert, torch.where(expert == 0, 0.0, one))
        if "down" in name:
            masks += [expert == 0 for expert in now]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])  # nor between layers


def test_without_a_mask_nothing_changes_but_the_router_decides():
    lm = model(masked=0.0)
    alone(lm, True)
    expected = lm(IDS).logits
    alone(lm, False)
    torch.testing.assert_close(lm(IDS).logits, expected)  # weights sum to 1 over equal experts


def test_a_schedule_spawns_once_and_a_later_start_never(tmp_path):
    lm = model()
    schedule = Schedule(lm, "model.layers.*.mlp.experts.alone", {"kind": "steps", "values": [True, False], "at": [0.5]})
    weight = lm.model.layers[0].mlp.experts.down_proj
    for step in range(5):
        schedule.apply(Moment(step, 10))
        assert lm.model.layers[0].mlp.experts.alone
    assert not torch.equal(weight[0], weight[1])
    schedule.apply(Moment(5, 10))
    spawned = weight.clone()
    assert bool((spawned == 0).any())
    with torch.no_grad():
        weight += 1
    schedule.apply(Moment(6, 10))
    torch.testing.assert_close(weight, spawned + 1)
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    later = {"kind": "steps", "values": [True, False], "at": [0.5]}
    Schedule(again, "model.layers.*.mlp.experts.alone", later).apply(Moment(7, 10))
    torch.testing.assert_close(again.model.layers[0].mlp.experts.down_proj, weight)


def test_bad_options():
    with pytest.raises(OptionError, match="masked=1 is a share of an expert's weights"):
        model(masked=1.0)
    with pytest.raises(OptionError, match="experts 'tiny' is not known: choose one of"):
        MoekitForCausalLM(MoekitConfig(**SIZES, experts="tiny"))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_and_no_slots(tokens):
    experts = model().model.layers[0].mlp.experts
    experts.alone = True
    x = torch.randn(tokens, 8)
    nothing = torch.full((tokens, 2), 4)
    assert experts(x, nothing, torch.zeros(tokens, 2)).shape == x.shape
