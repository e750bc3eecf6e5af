"""The arithmetic of routers: what must hold for any recipe, and how a recipe is told from a module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import build
from moekit.blocks import blocks, compose
from moekit.blocks.recipe import ACTIVATIONS, Recipe
from moekit.blocks.router import FamilyRouter, forbid
from moekit.contract import PAD, Context, RouterEdit, Routing
from moekit.errors import UnsupportedModelError

RECIPES = st.builds(
    Recipe,
    top_k=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    ranked=st.sampled_from(["scores", "logits"]),
    normalise=st.sampled_from([None, ("sum", 1e-20), ("clamp", 1e-12), ("norm", 2.0)]),
    weights=st.sampled_from(["scores", "softmax"]),
    scale=st.sampled_from([1.0, 2.5]),
)
GROUPED = st.builds(
    Recipe,
    top_k=st.just(2),
    activation=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.just((4, 2)),
    group_score=st.sampled_from(["top2", "max"]),
    fill=st.sampled_from([-math.inf, 0.0]),
    normalise=st.just(("sum", 1e-20)),
)


def _random(seed: int, experts: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, experts, generator=generator) * 2, torch.rand(experts, generator=generator)


def _dense(recipe: Recipe, logits: Tensor, bias: Tensor, edit: RouterEdit | None = None) -> Tensor:
    logits = logits if edit is None or edit.after_score is None else edit.after_score(logits, Context())
    expert = recipe.select(logits, bias, None if edit is None else edit.selection_bias)
    return Routing(expert, recipe.weigh(logits, expert)).dense(logits.shape[1])


@settings(max_examples=60)
@given(RECIPES, st.integers(0, 10**6), st.sets(st.integers(0, 11), min_size=3, max_size=11))
def test_forbidding_experts_equals_their_absence(recipe: Recipe, seed: int, kept: set[int]) -> None:
    logits, bias = _random(seed)
    keep = sorted(kept)
    masked = _dense(recipe, logits, bias, forbid(keep, 12))
    torch.testing.assert_close(masked[:, keep], _dense(recipe, logits[:, keep], bias[keep]), atol=1e-6, rtol=1e-5)
    assert masked[:, [e for e in range(12) if e not in kept]].abs().max() == 0


@settings(max_examples=60)
@given(GROUPED, st.integers(0, 10**6), st.sets(st.integers(0, 2), min_size=2, max_size=2))
def test_forbidding_equally_many_of_each_group_equals_their_absence(recipe: Recipe, seed: int, kept: set[int]) -> None:
    logits, bias = _random(seed)
    keep = [3 * group + e for group in range(4) for e in sorted(kept)]
    masked = _dense(recipe, logits, bias, forbid(keep, 12))
    torch.testing.assert_close(masked[:, keep], _dense(recipe, logits[:, keep], bias[keep]), atol=1e-6, rtol=1e-5)


def test_masking_logits_alone_would_not_be_enough_where_a_bias_is_added() -> None:
    recipe = Recipe(top_k=2, activation="sigmoid")
    logits, bias = torch.full((1, 4), -9.0), torch.tensor([5.0, 0.0, 0.0, 0.0])
    masked = logits.clone()
    masked[:, 0] = -math.inf
    ranked = recipe.scores(masked) + bias
    assert int(ranked.argmax()) == 0, "the bias lifts a masked expert back: the trap exists"
    assert 0 not in recipe.select(masked, bias)


@settings(max_examples=30)
@given(RECIPES, st.integers(0, 10**6))
def test_unused_slots_take_no_part_in_the_weights(recipe: Recipe, seed: int) -> None:
    logits, _ = _random(seed)
    expert = logits.topk(3).indices
    dropped = expert.clone()
    dropped[:, 1] = PAD
    weight = recipe.weigh(logits, dropped)
    assert bool((weight[:, 1] == 0).all())
    torch.testing.assert_close(weight[:, [0, 2]], recipe.weigh(logits, expert[:, [0, 2]]), atol=1e-6, rtol=1e-5)


def test_no_tokens_and_more_slots_than_allowed_experts() -> None:
    recipe = Recipe(top_k=2, normalise=("sum", 1e-20))
    empty = recipe.select(torch.zeros(0, 4))
    assert empty.shape == (0, 2)
    assert recipe.weigh(torch.zeros(0, 4), empty).shape == (0, 2)
    routing = _dense(recipe, torch.randn(5, 4), torch.zeros(4), forbid([2], 4))
    assert torch.equal(routing, torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(5, 4)), "one expert left takes all weight"


class _Router(nn.Module):
    """A router as a new family might have it: known parts in a combination no present family uses."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10))
        self.bias_for_choice = nn.Buffer(torch.zeros(6))
        self.boost, self.floor = 1.75, floor

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.tanh(hidden @ self.weight.T) * 3
        scores = nn.functional.softplus(logits).sqrt()
        index = (scores + self.bias_for_choice).topk(2).indices
        weight = scores.gather(1, index)
        return weight / (weight.sum(1, keepdim=True) + self.floor) * self.boost, index, logits


def test_an_unknown_router_of_known_parts_is_identified_wherever_its_outputs_stand() -> None:
    module = _Router(floor=1e-6)
    router = FamilyRouter.build(module, nn.Module(), 6)
    assert router.positions == (2, 0, 1)
    assert router.recipe.activation == "sqrtsoftplus"
    assert router.recipe.bias_name == "bias_for_choice"
    assert router.recipe.scale == 1.75
    nn.init.uniform_(module.bias_for_choice)
    x = torch.randn(30, 10)
    weight, index, _ = module(x)
    mine = compose(router, router.score(x, Context()), Context())
    torch.testing.assert_close(mine.dense(6), Routing(index, weight).dense(6))


def test_a_router_of_unknown_arithmetic_is_refused() -> None:
    class Odd(_Router):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            weight, index, logits = super().forward(hidden)
            return weight**3, index, logits

    with pytest.raises(UnsupportedModelError, match="the routing of Odd matches none of moekit's recipes"):
        FamilyRouter.build(Odd(floor=1e-6), nn.Module(), 6)


def test_a_router_that_returns_something_else_is_refused() -> None:
    class Silent(_Router):
        def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
            return hidden @ self.weight.T

    with pytest.raises(UnsupportedModelError, match=r"Silent does not return \(logits, weights, ids\)"):
        FamilyRouter.build(Silent(floor=1e-6), nn.Module(), 6)


def test_a_token_hash_router_asks_for_the_tokens() -> None:
    block = blocks(build("deepseek_v4")[0])[0]
    with pytest.raises(UnsupportedModelError, match=r"give Context\(input_ids=...\)"):
        block.choose(torch.randn(3, 32))
