"""Trained contestants of the language-model protocol, looked at while they are at hand: what bits per byte alone do
not say. A probe's figures are kept beside the contestant's, so that neither is worked out twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.lab.experiments import Advance
from moekit.lab.experiments._league import DOMAINS, at_hand, cache, fingerprint, play, trained, windows
from moekit.nn import MoE
from moekit.train.recipe import Recipe, Training

Probe = Callable[[Any, int], Mapping[str, float]]
"""Of a trained model and a seed: figures by name."""


def probed(recipe: Recipe, seed: int, name: str, probe: Probe) -> dict[str, Any]:
    """What :func:`play` says of a contestant, and under "probe" what ``probe`` does, in the cache by ``name``."""
    recipe = recipe.with_options(seed=seed)
    kept = cache() / f"{fingerprint(recipe)}.{name}.json"
    if not kept.is_file():
        keep(kept, dict(probe(at_hand(recipe, seed), seed)))
    return play(recipe, seed) | {"probe": json.loads(kept.read_text())}


def slots(recipe: Recipe, seed: int) -> list[float]:
    """How many experts computed for a token at each training step, mean over layers; those that are alone count one."""
    recipe, course = recipe.with_options(seed=seed), list[float]()
    kept = cache() / f"{fingerprint(recipe)}.experts.json"
    if kept.is_file():
        return json.loads(kept.read_text())

    def after(step: int, record: Any, running: Training) -> None:
        layers = [module for module in running.model.modules() if isinstance(module, MoE)]
        alone = [getattr(layer.experts, "alone", False) for layer in layers]
        per_token = [
            1.0 if single else float(load.sum()) / tokens for single, load in zip(alone, running.load, strict=True)
        ]
        course.append(float(np.mean(per_token)))

    rows = recipe.options.accumulate * recipe.batch
    tokens = rows * (recipe.length + 1)  # what is read: the last token of a row is foretold, and routed too
    trained(recipe, after)
    keep(kept, course)
    return course


def keep(path: Path, figures: Any) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(figures, indent=1))
    partial.replace(path)


def league(
    arms: Mapping[str, Recipe],
    seeds: Sequence[int],
    advance: Advance,
    name: str,
    probes: Mapping[str, Probe],
) -> list[dict[str, dict[str, Any]]]:
    """As the protocol's ``league``, with a probe for some of the contestants."""
    found = []
    for number, seed in enumerate(seeds):
        played = {}
        for place, (arm, recipe) in enumerate(arms.items()):
            advance(number * len(arms) + place, len(seeds) * len(arms))
            played[arm] = probed(recipe, seed, name, probes[arm]) if arm in probes else play(recipe, seed)
        found.append(played)
    return found


def probes(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, float]]:
    """The figures of all probes, seed by seed, each named by contestant and figure."""
    return [
        {f"{arm} {name}": value for arm, one in played.items() for name, value in one.get("probe", {}).items()}
        for played in found
    ]


def bits(model: Any, seed: int, rows: int = 32, texts: Callable[[str, int], Tensor] = windows) -> float:
    """Bits per byte on some of a seed's unseen text, mean over the domains."""
    return float(np.mean([per_byte(model, texts(domain, seed)[:rows]) for domain in DOMAINS]))


@torch.no_grad()
def per_byte(model: Any, ids_BS: Tensor) -> float:
    """Bits that a model needs for a byte of these rows."""
    logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(logits, ids_BS[:, 1:].reshape(-1))) / float(np.log(2))
