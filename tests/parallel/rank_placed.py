"""What the ranks do for test_moetuner: one layer whose experts a placement has dealt, as unevenly as it likes."""

from __future__ import annotations

from typing import Any

from moekit.lab.experiments._spread import bank, batch, exact, world
from moekit.parallel import Engine, Layout, shard


def run(owner: tuple[int, ...]) -> dict[str, Any]:
    """The worst difference from one process, the (token, slot) experts of this rank, and the rows it sent."""
    here = world()
    layout, whole = Layout(here.size, owner), bank(len(owner))
    engine = Engine(here, layout)
    difference = max(exact(engine, whole).values())
    x, routing = batch("zipf", here.rank, len(owner))
    here.traffic.clear()
    engine.forward(shard(whole, layout, here.rank), x, routing)
    return {"difference": difference, "expert": routing.expert.tolist(), "sent": here.traffic.as_dict()}
