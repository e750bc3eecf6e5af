"""Top-k within the best groups of experts: against every way of choosing, and against stock routing."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from wholes import leaks, lives, tiny

from moekit.contract import PAD, Context
from moekit.errors import OptionError
from moekit.nn import MoekitConfig, Router, Site
from moekit.nn.group_limited import GroupLimited

SITE = Site(hidden_size=6, intermediate_size=4, num_experts=12, top_k=3)
SIGMOID = {"activation": "sigmoid", "weigh": {"kind": "scores", "scale": 2.5}}


def by_hand(ranks, groups, keep, highest, k):
    """The set that the definition names, found by trying all sets of groups."""
    size = len(ranks) // groups
    cut = [sorted((v for v in ranks[g * size : (g + 1) * size] if v > -math.inf), reverse=True) for g in range(groups)]
    score = [sum(values[:highest]) if values else -math.inf for values in cut]
    kept = max(itertools.combinations(range(groups), keep), key=lambda some: sum(max(score[g], -1e9) for g in some))
    free = [e for e in range(len(ranks)) if e // size in kept and ranks[e] > -math.inf]
    return set(sorted(free, key=lambda e: -ranks[e])[:k])


@given(data=st.data())
def test_it_is_what_the_definition_says(data):
    groups = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    size = 12 // groups
    keep, highest = data.draw(st.integers(1, groups)), data.draw(st.integers(1, size))
    k = data.draw(st.integers(1, keep * size))
    ranks = data.draw(st.permutations([2.0**n for n in range(12)]))  # no two sums are alike
    barred = data.draw(st.sets(st.integers(0, 11), max_size=11))
    ranks = [-math.inf if e in barred else value for e, value in enumerate(ranks)]
    chosen = GroupLimited(SITE, groups=groups, keep=keep, highest=highest, k=k)(torch.tensor([ranks]), Context())[0]
    assert chosen.shape == (k,)
    assert set(chosen[chosen != PAD].tolist()) == by_hand(ranks, groups, keep, highest, k)


@pytest.mark.parametrize(("groups", "keep"), [(1, 1), (4, 4)])
def test_where_every_group_is_kept_it_is_top_k(groups, keep):
    scores = torch.rand(20, 12)
    chosen = GroupLimited(SITE, groups=groups, keep=keep)(scores, Context())
    assert torch.equal(chosen, scores.topk(3).indices)


def test_it_is_stock_routing():
    sizes = {"num_experts_per_tok": 3, "n_routed_experts": 12, "hidden_size": 6, "n_group": 4, "topk_group": 2}
    stock = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, routed_scaling_factor=2.5))
    torch.nn.init.normal_(stock.weight)
    stock.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 12)[torch.randperm(12)])
    select = {"kind": "group-limited", "groups": 4, "keep": 2}
    own = Router(SITE, {"select": select, **SIGMOID}, corrected=True)
    own.scorer.weight.data.copy_(stock.weight)
    own.bias.copy_(stock.e_score_correction_bias)
    x = torch.randn(200, 6)
    with torch.no_grad():
        ours, theirs = own.routing(own(x)), own.routing(stock(x))
    torch.testing.assert_close(ours.dense(12), theirs.dense(12))
    plain = Router(SITE, SIGMOID, corrected=True)
    plain.load_state_dict(own.state_dict())
    assert not torch.equal(plain.routing(plain(x)).dense(12) > 0, ours.dense(12) > 0)  # the limit is felt


def test_nan_is_no_reason_to_choose_nothing():
    chosen = GroupLimited(SITE, groups=4, keep=2)(torch.full((2, 12), math.nan), Context())
    assert (chosen != PAD).all()
    assert GroupLimited(SITE, groups=4, keep=2)(torch.zeros(0, 12), Context()).shape == (0, 3)


def test_in_a_model(tmp_path):
    router = {"select": {"kind": "group-limited", "groups": 2, "keep": 1}, **SIGMOID}
    model = lives(tmp_path, router=router, correction={}, balance={"load": {"weight": 0.01, "groups": 2}})
    assert not leaks(model)
    assert MoekitConfig(router=router).expert_step == 2
    assert tiny(router=router).model.layers[0].mlp.gate.top_k == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 5, "keep": 1}, "5 groups do not divide 12 experts evenly"),
        ({"groups": 0, "keep": 1}, "0 groups do not divide"),
        ({"groups": 4, "keep": 5}, "keep=5 of 4 groups: give 1 to 4"),
        ({"groups": 4, "keep": 0}, "keep=0 of 4 groups"),
        ({"groups": 12, "keep": 3}, "highest=2 scores of a group of 1 experts: give 1 to 1"),
        ({"groups": 4, "keep": 2, "highest": 0}, "highest=0 scores"),
        ({"groups": 6, "keep": 1}, "top-k of 3 among the 2 experts of 1 groups: give 1 to 2"),
        ({"groups": 4, "keep": 2, "k": 0}, "top-k of 0 among the 6 experts"),
        ({"groups": 4}, "needs the option 'keep'"),
    ],
)
def test_limits_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        Router(SITE, {"select": {"kind": "group-limited", **options}})
