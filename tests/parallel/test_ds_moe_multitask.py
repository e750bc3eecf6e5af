"""Random token selection keeps every slot alike and drops before weights are normalised; two models become one."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_attach import SIZES
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.blocks import blocks
from moekit.contract import PAD
from moekit.errors import OptionError, UnsupportedModelError
from moekit.parallel import ParallelError
from moekit.parallel._capacity import capacity_of, kept
from moekit.parallel.ds_moe_multitask import RandomTokens, aggregate


def model(experts=4, seed=0, **more):
    torch.manual_seed(seed)
    sizes = SIZES | {"num_experts": experts, "norm_topk_prob": True, **more}
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).double().eval()
    net.set_experts_implementation("eager")
    return net


def test_capacity():
    assert capacity_of(64, 2, 8, 1.0) == 16
    assert capacity_of(65, 2, 8, 0.5) == math.ceil(65 / 8)
    assert capacity_of(4, 1, 8, 0.5) == 4


@settings(max_examples=100)
@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.booleans(), st.integers(0, 99))
def test_no_expert_takes_more_and_none_takes_less_than_it_could(tokens, width, experts, capacity, random, seed):
    draw = torch.Generator().manual_seed(seed)
    expert = torch.randint(-1, experts, (tokens, width), generator=draw)
    left = kept(expert, experts, capacity, draw if random else None)
    assert bool(((left == expert) | (left == PAD)).all())
    for e in range(experts):
        assert int((left == e).sum()) == min(capacity, int((expert == e).sum()))


def test_the_usual_rule_keeps_first_choices_in_order():
    expert = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])
    assert kept(expert, 2, 2).tolist() == [[0, 1], [0, PAD], [1, PAD], [PAD, PAD]]


def test_at_random_every_slot_has_the_same_chance():
    """Chi-square of 4000 draws over 12 positions; the usual rule keeps the first five always."""
    draw, expert = torch.Generator().manual_seed(5), torch.zeros(12, 1, dtype=torch.int64)
    counts = sum((kept(expert, 1, 5, draw) == 0).squeeze(1).double() for _ in range(4000))
    wanted = 4000 * 5 / 12
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 31.3  # 99.9 % of chi-square with 11 degrees
    assert (kept(expert, 1, 5) == 0).squeeze(1).tolist() == [True] * 5 + [False] * 7


def test_tokens_are_dropped_in_training_only_and_before_weights_are_normalised():
    net, seen = model(), []
    ids = torch.randint(1, 31, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = net(ids, use_cache=False).logits
    with RandomTokens(factor=0.5, least=1).during(net) as found:
        torch.testing.assert_close(net(ids, use_cache=False).logits, whole, rtol=0, atol=1e-6)
        net.train()
        with found[0].observe(lambda seen_at: seen.append(seen_at.routing)):
            dropped = net(ids, use_cache=False).logits
        dropped.sum().backward()
    assert not torch.allclose(dropped, whole)
    used = seen[0].used
    assert int(seen[0].counts(4).max()) == math.ceil(0.5 * 24 * 2 / 4)
    some = used.any(1)
    assert bool((used.sum(1) == 1).any())
    torch.testing.assert_close(
        seen[0].weight.sum(1)[some], torch.ones(int(some.sum()), dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert net.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    assert torch.equal(net(ids, use_cache=False).logits, whole)


def test_enough_capacity_changes_nothing():
    net = model().train()
    ids = torch.randint(1, 31, (2, 12), generator=torch.Generator().manual_seed(1))
    with RandomTokens(factor=4).during(net):
        inside = net(ids, use_cache=False).logits
    torch.testing.assert_close(inside, net(ids, use_cache=False).logits, rtol=0, atol=1e-6)


def test_no_capacity_at_all():
    with (
        pytest.raises(ParallelError, match="a capacity factor of 0 leaves no tokens"),
        RandomTokens(factor=0).during(model()),
    ):
        pass


def test_two_models_side_by_side():
    one, two = model(4, 0), model(3, 1)
    both = aggregate([one, two])
    assert both.config.num_experts == 7
    assert (one.config.num_experts, two.config.num_experts) == (4, 3)
    state, first, second = both.state_dict(), one.state_dict(), two.state_dict()
    for name, tensor in state.items():
        wanted = torch.cat([first[name], second[name]]) if ".experts." in name or ".gate." in name else first[name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("part", [0, 1])
def test_the_experts_of_one_parent_are_that_parent(part):
    """With the other's experts masked and shared weights equal, the aggregate says what the parent says."""
    one = model(4)
    two = copy.deepcopy(one)
    for block in blocks(two):
        block.put(block.bank().select([3, 2, 1, 0]))
        block.router_module.weight.data.copy_(torch.randn(4, 16, dtype=torch.float64))
    both = aggregate([one, two], rest=[0.5, 0.5])
    both.set_experts_implementation("eager")
    ids = torch.randint(1, 31, (2, 6), generator=torch.Generator().manual_seed(1))
    masks = [block.mask(range(4 * part, 4 * part + 4)).attach() for block in blocks(both)]
    torch.testing.assert_close(both(ids).logits, (one, two)[part](ids).logits)
    for mask in masks:
        mask.remove()


def test_means_of_what_is_shared():
    both = aggregate([one := model(4, 0), two := model(4, 1)], rest=[0.25, 0.75])
    got, a, b = (net.model.embed_tokens.weight for net in (both, one, two))
    torch.testing.assert_close(got, 0.25 * a + 0.75 * b)


@pytest.mark.parametrize(
    ("models", "rest", "error", "message"),
    [
        (lambda: [model()], None, OptionError, "1 models with weights"),
        (lambda: [model(), model()], [0.5, 0.6], OptionError, "weights that sum to 1"),
        (lambda: [model(), model(hidden_size=24)], None, OptionError, "cannot be joined"),
        (lambda: [model(), model(num_hidden_layers=1)], None, OptionError, "is not in every model"),
    ],
)
def test_models_that_do_not_fit(models, rest, error, message):
    with pytest.raises(error, match=message):
        aggregate(models(), rest)


def test_groups_of_experts_are_refused():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_experts", "head_dim")}
    config = DeepseekV3Config(
        **sizes, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    nets = [DeepseekV3ForCausalLM(config) for _ in range(2)]
    with pytest.raises(UnsupportedModelError, match="chooses experts by groups"):
        aggregate(nets)
