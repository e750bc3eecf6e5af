"""Uni-MoE-2.0 (n 80): do routed, shared and null experts take different shares of different modalities?

Setting: the recipe in small (3 layers, 64 wide, 4 routed experts, one null, one shared, top-p 0.7) learns to go on with
sequences of 64 tokens of three modalities, each in a third of the ids: `text`, bytes of prose; `image`, rows of an
8 x 8 picture, a smooth random surface in 64 levels; `sound`, 64 levels of two sines with random phases and a little
noise. A batch holds 8 sequences; 600 steps. Judged on 48 unseen sequences of each modality. The router is told nothing
of modalities, but their ids have nothing in common, so that any router tells them apart to some degree: what counts is
what training adds to the untrained model. The paper's model and benchmarks are out of reach here; this only tries that
the kinds of experts divide the work.

Rule. `shown` if and only if the 95 % t intervals over seeds lie above zero for what training adds to

1. the mutual information between modality and choice (mean over layers, in nats), and
2. how far the null expert's share of all choices (mean over layers) differs between two modalities.

Reported: losses of each modality, also without the shared expert, and against the entropy of its bytes or levels taken
one by one, which shows that something was learnt. A first rule asked for more than with the sequences' modalities
shuffled, after 150 steps; a model of one step passed that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit import lab
from moekit.lab._splits import Split
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import Use, size
from moekit.lab.experiments._seeds import each_seed
from moekit.nn import MoE
from moekit.train import Batch
from moekit.train.recipe import Recipe, carry_out

MODALITIES = ("text", "image", "sound")
STEPS, ROWS, LENGTH, TEST, LEVELS, BYTES = 600, 8, 64, 48, 64, 100_000
RULE = ("information", "spread_of_null")
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 256 + 2 * LEVELS}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return what each modality's tokens chose, trained and untrained. ``text`` is not used."""
    found = each_seed(seeds, advance, contest)
    figures: dict[str, Any] = {name: means([one[name] for one in found]) for name in found[0]}
    figures["rule"] = {name: gap([one[name] for one in found], "trained", "untrained") for name in RULE}
    return Outcome(shown=holds(figures), figures=figures, setting={"steps": STEPS, "tokens_per_step": ROWS * LENGTH})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def contest(seed: int) -> dict[str, dict[str, float]]:
    """One seed: count on unseen sequences what each chose, before and after training."""
    recipe = Recipe.read("uni-moe-2").with_model(**SIZES, **SPECIAL).with_options(steps=STEPS, seed=seed)

    def batch(step: int) -> Batch:
        draw = np.random.default_rng((seed, step))
        rows = [sequence(kind, draw, train=True) for kind in draw.choice(MODALITIES, size=ROWS)]
        return {"input_ids": torch.from_numpy(np.stack(rows))}

    draw = np.random.default_rng((seed, STEPS, 1))
    rows = {kind: np.stack([sequence(kind, draw, train=False) for _ in range(TEST)]) for kind in MODALITIES}
    ids = torch.from_numpy(np.concatenate(list(rows.values())))
    label = np.repeat(np.arange(len(MODALITIES)), TEST)
    _, untrained_SLE = judged(recipe.build().eval(), ids)
    model = carry_out(recipe, batch)[0].eval()
    with Use(model) as use:
        loss, load_SLE = judged(model, ids)
    with no_shared(model):
        without, _ = judged(model, ids)
    loads = {"trained": load_SLE, "untrained": untrained_SLE}
    null = {name: null_shares(load, label) for name, load in loads.items()}
    return {
        "loss": by_kind(loss, label),
        "loss_without_shared": by_kind(without, label),
        "entropy": {kind: entropy(seen) for kind, seen in rows.items()},
        "null_share": dict(zip(MODALITIES, map(float, null["trained"]), strict=True)),
        "routed_per_token": by_kind(load_SLE[:, :, :-1].sum((1, 2)) / load_SLE.shape[1] / LENGTH, label),
        "information": {name: information(load, label) for name, load in loads.items()},
        "spread_of_null": {name: float(np.ptp(shares)) for name, shares in null.items()},
        "parameters": {"total": float(size(model)), "active": use.active(ids.numel())},
    }


def entropy(ids_SL: np.ndarray) -> float:
    """Of single symbols, in nats."""
    share = np.unique(ids_SL, return_counts=True)[1] / ids_SL.size
    return float(-(share * np.log(share)).sum())


@torch.no_grad()
def judged(model: Any, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(mean loss of each sequence [S], its choices counted [S, layers, E])."""
    losses, loads = [], []
    for row in ids:
        out = model(input_ids=row[None], labels=row[None], use_cache=False)
        losses.append(float(out.loss))
        loads.append(torch.stack(out.expert_load).numpy())
    return np.array(losses), np.stack(loads)


@contextmanager
def no_shared(model: Any) -> Iterator[None]:
    """The shared experts add nothing while it is open."""
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    kept = [layer.shared_expert for layer in layers]
    for layer in layers:
        layer.shared_expert = None
    try:
        yield
    finally:
        for layer, shared in zip(layers, kept, strict=True):
            layer.shared_expert = shared


def information(load_SLE: np.ndarray, label_S: np.ndarray) -> float:
    """Between a sequence's label and a choice of its tokens, in nats, mean over layers."""
    joint = np.stack([load_SLE[label_S == label].sum(0) for label in np.unique(label_S)]).astype(np.float64)
    share = joint / joint.sum((0, 2), keepdims=True)
    apart = share.sum(0, keepdims=True) * share.sum(2, keepdims=True)
    terms = np.where(share > 0, share * np.log(np.maximum(share, 1e-300) / np.maximum(apart, 1e-300)), 0)
    return float(terms.sum((0, 2)).mean())


def null_shares(load_SLE: np.ndarray, label_S: np.ndarray) -> np.ndarray:
    """By label, the last choice's share of all choices, mean over layers."""
    sums = np.stack([load_SLE[label_S == label].sum(0) for label in np.unique(label_S)])
    return (sums[:, :, -1] / sums.sum(2)).mean(1)


def by_kind(value_S: np.ndarray, label_S: np.ndarray) -> dict[str, float]:
    return {kind: float(value_S[label_S == number].mean()) for number, kind in enumerate(MODALITIES)}


@cache
def prose(split: Split) -> np.ndarray:
    body = lab.text("prose", split, BYTES).encode()
    return np.frombuffer(body, dtype=np.uint8).astype(np.int64)


def sequence(kind: str, draw: np.random.Generator, *, train: bool) -> np.ndarray:
    """[LENGTH] ids of one modality; text for judging is from the test split."""
    if kind == "text":
        body = prose("train" if train else "test")
        start = int(draw.integers(len(body) - LENGTH))
        return body[start : start + LENGTH]
    side = np.arange(8)
    if kind == "image":
        wave = draw.normal(size=(3, 3))
        basis = np.cos(np.pi * np.outer(np.arange(3), side + 0.5) / 8)
        picture = basis.T @ wave @ basis
        return 256 + levels(picture.ravel())
    time = np.arange(LENGTH)
    waves = [np.sin(2 * np.pi * (rate * time / LENGTH + draw.random())) for rate in draw.integers(2, 12, size=2)]
    return 256 + LEVELS + levels(waves[0] + waves[1] + 0.05 * draw.normal(size=LENGTH))


def levels(value: np.ndarray) -> np.ndarray:
    """Numbers as whole levels from 0 on, over their own range."""
    scaled = (value - value.min()) / (np.ptp(value) + 1e-9)
    return np.minimum((scaled * LEVELS).astype(np.int64), LEVELS - 1)
