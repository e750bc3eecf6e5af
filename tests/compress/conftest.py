"""A small source and what a profile saw of it, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from moekit.formats import DenseBank
from moekit.plan.planner import Site
from moekit.profile.document import Profile
from moekit.profile.layer import LayerProfile


@dataclass
class Model:
    sites: list[Site]
    banks: dict[str, DenseBank] = field(default_factory=dict)
    fingerprint: str = "f" * 64

    @property
    def moe_layers(self) -> list[Site]:
        return self.sites

    def bank(self, layer: str) -> DenseBank:
        return self.banks[layer]


def dense(experts: int = 8, hidden: int = 6, inner: int = 4, seed: int = 0) -> DenseBank:
    generator = torch.Generator().manual_seed(seed)
    return DenseBank(
        torch.randn(experts, 2 * inner, hidden, generator=generator),
        torch.randn(experts, hidden, inner, generator=generator),
    )


def seen(seed: int = 0, experts: int = 8) -> LayerProfile:
    """Random sums [half, domain, phase, E] in one half and phase, over 50 tokens."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, 20, (1, 2, 1, experts)).astype(float)
    sums = {name: draw.random(counts.shape) * counts for name in ("probability", "gate_norm", "contribution")}
    logits = draw.normal(size=(50, experts))
    arrays = sums | {"counts": counts, "logit_gram": logits.T @ logits}
    arrays |= {name: draw.random(counts.shape) * counts for name in ("selected_probability", "strong_logit")}
    arrays |= {"tokens": np.full((1, 2, 1), 25.0), "max_abs_down": draw.random(experts)}
    arrays |= {"hidden": draw.normal(size=(50, 6)).astype(np.float32), "sample_domain": np.arange(50) % 2}
    arrays |= {"sample_expert": draw.permuted(np.tile(np.arange(experts), (50, 1)), axis=1)[:, :2].astype(np.int32)}
    arrays |= {"sample_weight": draw.random((50, 2)).astype(np.float32)}
    return LayerProfile("layer", 0, experts, 2, ("code", "prose"), arrays)


@pytest.fixture
def observe() -> Callable[..., LayerProfile]:
    return seen


@pytest.fixture
def model() -> Model:
    sites = [Site(f"model.layers.{i}.mlp", 8, 2) for i in range(2)]
    return Model(sites, {site.name: dense(seed=i) for i, site in enumerate(sites)})


@pytest.fixture
def profile(model: Model) -> Profile:
    layers = {site.name: seen(i) for i, site in enumerate(model.sites)}
    return Profile(model.fingerprint, "a model", ("code", "prose"), layers)
