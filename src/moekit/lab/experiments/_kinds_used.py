"""What tokens of a language-model row used, read off a contestant's figures: experts with weights and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moekit.lab.experiments._league import DOMAINS, TEST_BYTES
from moekit.measure import Interval

Played = Mapping[str, Mapping[str, Any]]


def slots(figures: Mapping[str, Any]) -> list[float]:
    """Mean number of experts with weights that a token uses, layer by layer."""
    experts = _numbers(figures)
    loads = figures["load"]
    return [sum(load[:count]) / (len(DOMAINS) * TEST_BYTES) for load, count in zip(loads, experts, strict=True)]


def used(found: Sequence[Played], name: str) -> dict[str, float]:
    """Interval over seeds of the mean number of experts with weights per token and layer."""
    return asdict(Interval.over_seeds([float(np.mean(slots(played[name]))) for played in found]))


def follows(found: Sequence[Played], name: str) -> dict[str, float]:
    """Interval over seeds of the correlation of the experts a position used with its loss; 0 where there is none."""
    return asdict(Interval.over_seeds([float(played[name]["slots_follow_loss"] or 0.0) for played in found]))


def _numbers(figures: Mapping[str, Any]) -> list[int]:
    """How many of a layer's choices are experts with weights."""
    others = len(figures["recipe"]["model"].get("others") or ())
    return [len(load) - others for load in figures["load"]]
