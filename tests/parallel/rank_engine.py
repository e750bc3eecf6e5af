"""What the ranks do for test_engine."""

from __future__ import annotations

from itertools import pairwise

import torch

from moekit.lab.experiments._spread import bank, exact, world
from moekit.parallel import DispatchPlan, Engine, Layout, Piece, flat, native, two_level


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


def run(plan: str, nodes: int, chunks: int, rematerialise: bool, gated: bool, dtype: str) -> dict[str, float]:
    """The worst difference over all routings."""
    here = world(nodes)
    engine = Engine(
        here,
        Layout.contiguous(6, here.size),
        native if plan == "native" else scattered,
        exchange=two_level if nodes > 1 else flat,
        chunks=chunks,
        rematerialise=rematerialise,
    )
    return exact(engine, bank(6, gated=gated, bias=gated, dtype=getattr(torch, dtype)))
