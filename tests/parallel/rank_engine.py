"""What the ranks do for test_engine."""

from __future__ import annotations

from itertools import pairwise

import torch
from rank_layers import ROUTINGS, bank, world, worst

from moekit.parallel import DispatchPlan, Engine, Layout, Piece, flat, two_level


def scattered(counts, layout):
    """A legal plan without any sense: the tokens of every expert are cut at thirds and dealt to ranks by a hash."""
    pieces = []
    for expert, load in enumerate(sum(column) for column in zip(*counts, strict=True)):
        cuts = [0, load // 3, load // 3, 2 * load // 3, load]
        for part in range(layout.slices):
            pieces += [
                Piece(expert, part, a, b, (7 * expert + 3 * i + part) % layout.world)
                for i, (a, b) in enumerate(pairwise(cuts))
            ]
    return DispatchPlan(layout, tuple(reversed(pieces)), parts=layout.slices, copies=((0, layout.world - 1),))


def exact(plan: str, nodes: int, chunks: int, rematerialise: bool, gated: bool, dtype: str) -> dict[str, float]:
    """The worst difference over all routings."""
    here = world(nodes)
    planner = {"planner": scattered} if plan == "scattered" else {}
    exchange = two_level if nodes > 1 else flat
    engine = Engine(
        here,
        Layout.contiguous(6, here.size),
        exchange=exchange,
        chunks=chunks,
        rematerialise=rematerialise,
        **planner,
    )
    whole = bank(6, gated=gated, bias=gated, dtype=getattr(torch, dtype))
    found: dict[str, float] = {}
    for kind in ROUTINGS:
        for name, gap in worst(engine, whole, kind).items():
            found[name] = max(found.get(name, 0.0), gap)
    return found
