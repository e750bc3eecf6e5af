"""Changes to a routing at run time, between a family's own router and the stored experts: the second half of a router.

A rewrite sees what the experts would see and returns it changed: fewer slots (-1 pads), other weights, another input.
It is stored with the experts it belongs to, so that a checkpoint routes the same wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import OptionError
from ._rewrite import PAD, Rewrite, Routed, Scales, keep_slots, rank_of
from .gate import ResidualGate
from .slots import PrefixMask, RatioSkip, TopSlots
from .vectors import AuxiliaryVectors, ProjectionVectors
from .widths import BitWidths

__all__ = [
    "PAD",
    "REWRITES",
    "AuxiliaryVectors",
    "BitWidths",
    "PrefixMask",
    "ProjectionVectors",
    "RatioSkip",
    "ResidualGate",
    "Rewrite",
    "Routed",
    "Scales",
    "TopSlots",
    "allocate_rewrite",
    "keep_slots",
    "rank_of",
]

REWRITES: dict[str, type[Rewrite]] = {
    kind.KIND: kind
    for kind in (TopSlots, ResidualGate, RatioSkip, PrefixMask, AuxiliaryVectors, ProjectionVectors, BitWidths)
}


def allocate_rewrite(describe: Mapping[str, Any], rows: int, hidden_size: int, device: torch.device | str) -> Rewrite:
    """An uninitialised rewrite as ``describe`` says. OptionError for a kind this moekit does not know."""
    kind = describe.get("kind")
    if kind not in REWRITES:
        raise OptionError(
            f"the checkpoint changes its routing by '{kind}', which this moekit does not know (it knows "
            f"{', '.join(REWRITES)}): update moekit"
        )
    with torch.device(device):
        return REWRITES[kind].allocate(describe, rows, hidden_size)
