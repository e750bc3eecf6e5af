"""MomentumSMoE (n 109): does momentum over depth help, on clean and on corrupted text, beyond taking larger steps?

Setting: the protocol of ``_league``, six MoE layers. Contestants: the base recipe; ``momentum``, the recipe (mu =
0.7); ``gain``, the base whose MoE sublayers add 1 / (1 - mu) times as much: as large a step without memory; ``adam``
and ``robust``, the paper's other two, for the record. All are judged further on the same text in which every tenth
word is replaced by another word of it.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of (base minus momentum), on
clean and on swapped text, and of (gain minus momentum) on clean text, in bits per byte, all lie above zero.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit import lab
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, TEST_BYTES, contestant, lead, setting, table
from moekit.lab.experiments._probing import bits, league, probes
from moekit.train.recipe import Recipe

KEY, MOMENTUM, GAIN, ADAM, ROBUST = "momentum-smoe", "momentum", "gain", "adam", "robust"
MU, EVERY, LENGTH = 0.7, 10, 128
SWAPPED = "swapped"


def arms() -> dict[str, Recipe]:
    """The contestants."""
    return {
        BASE: contestant(),
        MOMENTUM: contestant(KEY),
        GAIN: contestant(wiring={"kind": "residual", "gain": 1 / (1 - MU)}),
        ADAM: contestant(wiring={"kind": "adam-momentum", "mu": MU}),
        ROBUST: contestant(wiring="robust-momentum"),
    }


def corrupted(domain: str, seed: int) -> Tensor:
    """[B, 128] bytes of a domain's test split in which one word of ten is another word of the text."""
    text, chance = lab.text(domain, "test", TEST_BYTES, seed), random.Random(seed)
    words = re.findall(r"\w+", text)
    body = re.sub(r"\w+", lambda found: chance.choice(words) if chance.random() < 1 / EVERY else found.group(), text)
    flat = list(body.encode())
    return torch.tensor(flat[: len(flat) // LENGTH * LENGTH], dtype=torch.int64).view(-1, LENGTH)


def swapped(model: Any, seed: int) -> dict[str, float]:
    """Bits per byte on corrupted text."""
    return {SWAPPED: bits(model, seed, rows=TEST_BYTES // LENGTH, texts=corrupted)}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses on clean and swapped text and momentum's lead. ``text`` is not used."""
    found = league(arms(), seeds, advance, SWAPPED, dict.fromkeys(arms(), swapped))
    corrupt = probes(found)
    leads = {name: lead(found, name, MOMENTUM) for name in arms() if name != MOMENTUM}
    leads[SWAPPED] = gap(corrupt, f"{BASE} {SWAPPED}", f"{MOMENTUM} {SWAPPED}")
    leads[f"{GAIN}, {SWAPPED}"] = gap(corrupt, f"{GAIN} {SWAPPED}", f"{MOMENTUM} {SWAPPED}")
    figures = table(found) | {"minus_momentum": leads, SWAPPED: means(corrupt)}
    return Outcome(shown=holds(leads), figures=figures, setting=setting(arms()))


def holds(leads: Mapping[str, Mapping[str, float]]) -> bool:
    """The rule of the module's docstring."""
    return all(leads[name]["low"] > 0 for name in (BASE, SWAPPED, GAIN))
