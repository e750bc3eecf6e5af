"""EASY-EP: three factors in one score, and mixed domains that weigh alike however much text each has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.compress import method
from moekit.compress._scores import balanced
from moekit.errors import ProfileError
from moekit.profile.layer import LayerProfile

NAME = "model.layers.0.mlp"
SCORES = st.lists(st.integers(0, 1000), min_size=8, max_size=8)


def kept(plan) -> list[int]:
    return sorted(plan.layers[NAME].sources)


def test_contribution_decides_where_the_factors_disagree(model, profile) -> None:
    """Chosen most, largest gate times norm, and contributing most are three different halves of the experts."""
    layer = profile.layers[NAME]
    layer.counts[:] = [9, 9, 9, 9, 1, 1, 1, 1]
    layer.gate_norm[:] = [1, 1, 9, 9, 9, 9, 1, 1]
    layer.contribution[:] = [1, 9, 9, 1, 9, 1, 9, 1]
    assert kept(method("frequency:keep=4").plan(profile, model)) == [0, 1, 2, 3]
    assert kept(method("easy-ep:keep=4").plan(profile, model)) == [1, 2, 4, 6]


def test_mixed_is_the_sum_of_each_domain_scaled_to_one(model, profile) -> None:
    layer = profile.layers[NAME]
    code, prose = (layer.total("contribution", [domain]) for domain in ("code", "prose"))
    mixed = balanced(layer, "contribution", ("code", "prose"))
    assert np.allclose(mixed, code / code.sum() + prose / prose.sum())
    assert mixed.sum() == pytest.approx(2.0)


@given(SCORES, SCORES, st.floats(1e-3, 1e3))
def test_more_text_of_one_domain_changes_nothing(code, prose, times) -> None:
    layer = LayerProfile("layer", 0, 8, 2, ("code", "prose"), {"contribution": np.zeros((2, 2, 1, 8))})
    layer.contribution[:, 0, 0], layer.contribution[:, 1, 0] = code, prose
    before = balanced(layer, "contribution", ("code", "prose"))
    layer.contribution[:, 1] *= times
    assert np.allclose(balanced(layer, "contribution", ("code", "prose")), before, atol=1e-9)


def test_raw_sums_would_serve_the_larger_domain_alone(model, profile) -> None:
    """The fault this guards against: without the scaling, prose is lost."""
    layer = profile.layers[NAME]
    layer.contribution[:, 0] = [900, 800, 700, 600, 0, 0, 0, 0]
    layer.contribution[:, 1] = [0, 0, 0, 0, 9, 8, 7, 6]
    assert kept(method("easy-ep:keep=4").plan(profile, model)) == [0, 1, 4, 5]
    assert sorted(np.argsort(-layer.total("contribution"), kind="stable")[:4].tolist()) == [0, 1, 2, 3]
    assert kept(method("easy-ep:keep=4,domains=prose+code").plan(profile, model)) == [0, 1, 4, 5]
    assert kept(method("easy-ep:keep=4,domains=prose").plan(profile, model)) == [4, 5, 6, 7]


def test_a_silent_domain_adds_nothing(model, profile) -> None:
    layer = profile.layers[NAME]
    layer.contribution[:, 1] = 0
    alone = method("easy-ep:keep=4,domains=code").plan(profile, model)
    assert kept(method("easy-ep:keep=4").plan(profile, model)) == kept(alone)


def test_an_unknown_domain_is_named(model, profile) -> None:
    with pytest.raises(ProfileError, match="has no domain 'math': it has code, prose"):
        method("easy-ep:domains=math").plan(profile, model)
