"""UNCURL: clusters are those of the router's affinities, copies merge losslessly once aligned, usage weighs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.compress import method
from moekit.errors import OptionError, PlanError
from moekit.formats import DenseBank
from moekit.plan.planner import Site
from moekit.plan.recombine import recombined

NAME = "model.layers.0.mlp"


def blocky(kinds: list[int], seed: int = 0) -> np.ndarray:
    """The gram of router logits that agree inside each kind but for a little noise."""
    draw = np.random.default_rng(seed)
    base = draw.normal(size=(200, max(kinds) + 1))
    logits = base[:, kinds] + 0.1 * draw.normal(size=(200, len(kinds)))
    return logits.T @ logits


def test_the_clusters_are_those_the_router_makes(model, profile) -> None:
    profile.layers[NAME].logit_gram[:] = blocky([0, 1, 2, 0, 1, 2, 0, 0])
    layer = method("uncurl:keep=3").plan(profile, model).layers[NAME]
    groups = [{e for e in range(8) if layer.slots[e] == slot} for slot in set(layer.slots)]
    assert sorted(map(sorted, groups)) == [[0, 3, 6, 7], [1, 4], [2, 5]]
    assert len(layer.rows) == 8


@pytest.mark.parametrize("aligned", [True, False])
def test_permuted_copies_merge_losslessly_only_when_aligned(model, profile, aligned: bool) -> None:
    first = model.banks[NAME].select([0, 1, 2, 3])
    turned = first.permute(torch.stack([torch.tensor([2, 0, 3, 1])] * 4))
    model.banks[NAME] = DenseBank(torch.cat([first.gate_up, turned.gate_up]), torch.cat([first.down, turned.down]))
    profile.layers[NAME].logit_gram[:] = blocky([0, 1, 2, 3, 0, 1, 2, 3])
    profile.layers[NAME].counts[:] = [1, 2, 1, 2, 9, 9, 9, 9]
    layer = method(f"uncurl:keep=4,aligned={aligned}").plan(profile, model).layers[NAME]
    made = recombined(model.banks[NAME], layer)
    assert layer.slots == (0, 1, 2, 3, 0, 1, 2, 3)
    # aligned to the most used member, which is the copy
    assert torch.allclose(made.down, turned.down, atol=1e-6) is aligned
    assert torch.allclose(made.gate_up, turned.gate_up, atol=1e-6) is aligned


def test_weights_are_usage(model, profile) -> None:
    profile.layers[NAME].logit_gram[:] = blocky([0, 1, 0, 1, 0, 1, 0, 1])
    profile.layers[NAME].counts[:] = [6, 1, 2, 1, 0, 1, 0, 1]
    layer = method("uncurl:keep=2,aligned=false").plan(profile, model).layers[NAME]
    assert sorted(expert.parts for expert in layer.experts) == [
        ((0, 0.75), (2, 0.25)),
        ((1, 0.25), (3, 0.25), (5, 0.25), (7, 0.25)),
    ]


def test_mean_rows_are_weighted_like_the_weights(model, profile) -> None:
    profile.layers[NAME].logit_gram[:] = blocky([0, 1, 0, 1, 0, 1, 0, 1])
    profile.layers[NAME].counts[:] = [6, 1, 2, 1, 0, 1, 0, 1]
    layer = method("uncurl:keep=2,router=mean").plan(profile, model).layers[NAME]
    assert layer.plain_slots
    assert layer.rows == tuple(expert.parts for expert in layer.experts)
    profile.layers[NAME].counts[:] = 0
    layer = method("uncurl:keep=2,router=mean").plan(profile, model).layers[NAME]
    assert layer.rows[0] == ((0, 0.25), (2, 0.25), (4, 0.25), (6, 0.25))


def test_mean_rows_across_the_groups_of_a_router_are_refused(model, profile, observe) -> None:
    model.sites = [Site(NAME, 8, 2, groups=(2, 1))]
    profile.layers[NAME].logit_gram[:] = blocky([0, 1, 2, 3, 0, 1, 2, 3])
    with pytest.raises(PlanError, match="blends rows of several groups"):
        method("uncurl:keep=4,router=mean").plan(profile, model)
    assert len(method("uncurl:keep=4").plan(profile, model).layers[NAME].rows) == 8


def test_affinities_that_say_nothing_are_named(model, profile) -> None:
    profile.layers[NAME].logit_gram[:] = 1.0
    layer = method("uncurl:keep=4").plan(profile, model).layers[NAME]
    assert layer.why.endswith("all experts are scored alike, so the clusters mean nothing")
    assert [layer.slots.count(slot) for slot in range(4)] == [1, 1, 1, 5]


def test_keeping_all_changes_nothing(model, profile) -> None:
    assert method("uncurl:keep=1.0").plan(profile, model).layers[NAME].untouched


def test_wrong_options_are_refused(model, profile) -> None:
    with pytest.raises(OptionError, match="router=none is not rows or mean"):
        method("uncurl:router=none")
    with pytest.raises(OptionError, match=r"keep=0\.0 is no share"):
        method("uncurl:keep=0.0")
    profile.layers[NAME].logit_gram[0, 1] = float("nan")
    with pytest.raises(OptionError, match=r"the router logits of \S+ hold NaN or infinite values"):
        method("uncurl:keep=4").plan(profile, model)
