"""What the ranks do for test_tutel: the adaptive choice with a clock of its own."""

from __future__ import annotations

from itertools import chain, repeat

import torch

from moekit.contract import Routing
from moekit.lab.experiments._spread import bank, world
from moekit.parallel import Engine, shard
from moekit.parallel.tutel import Adaptive, Degree, stored_layout


class Watched(Engine):
    """An engine that says when it runs."""

    def run(self, *args):
        self.log.append(self.name)
        return super().run(*args)


def chooses() -> dict[str, list[int]]:
    """Which candidate runs, batch after batch. The slowest rank decides: each rank finds another one fast."""
    here, layout, log = world(), stored_layout(2, 2), []
    engines = [Watched(here, layout, Degree(degree)) for degree in (0, 1, 1)]
    for name, engine in enumerate(engines):
        engine.name, engine.log = name, log
    seconds = {0: [9, 2, 1, 5, 5, 1], 1: [1, 3, 8, 5, 5, 1]}[here.rank]
    clock = chain.from_iterable((0, s) for s in chain(seconds, repeat(0)))
    adaptive = Adaptive(engines, clock=lambda: next(clock))
    share = shard(bank(2), layout, here.rank)

    def step(index: list[int]) -> None:
        expert = torch.tensor(index).unsqueeze(1)
        x = torch.ones(len(index), 6, dtype=torch.float64)
        adaptive.forward(share, x, Routing(expert, torch.ones(expert.shape, dtype=torch.float64)))

    found = {}
    for name, batches, index in (("tried", 3, [0, 1]), ("kept", 2, [0, 1]), ("other_bucket", 4, [1, 1])):
        log.clear()
        for _ in range(batches):
            step(index)
        found[name] = list(log)
    return found
