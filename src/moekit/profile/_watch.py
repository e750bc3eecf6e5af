"""The statistics of every MoE layer, fed while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.errors import UnsupportedModelError
from moekit.profile._view import Cells, View
from moekit.profile.layer import LayerProfile
from moekit.profile.statistics import Room, Statistic, make

Now = Callable[[], tuple[int, Cells]]
"""Which batch is running, and what its tokens count towards."""


class Watch:
    """One set of statistics per block; ``attached`` observes the blocks as long as it is open."""

    def __init__(
        self, blocks: Sequence[MoEBlock], names: Sequence[str], num_domains: int, num_sampled: int, num_traced: int
    ) -> None:
        self.blocks = list(blocks)
        self._before: dict[int, tuple[int, Tensor]] = {}
        self._statistics: list[dict[str, Statistic]] = []
        for index, block in enumerate(self.blocks):
            previous = self.blocks[index - 1].num_experts if index else 0
            room = Room(block.num_experts, num_domains, previous, num_sampled, num_traced)
            self._statistics.append({name: make(name, room) for name in names})

    def moment_bytes(self) -> int:
        """Bytes the second moments of all layers will take; every other sum is small beside a layer."""
        squares = [block.hidden_size**2 * 8 for block in self.blocks]
        wide = [n * block.num_experts for n, block in zip(squares, self.blocks, strict=True)]
        kept = self._statistics[0] if self._statistics else {}
        return sum(squares) * ("input_moments" in kept) + sum(wide) * ("expert_moments" in kept)

    @contextmanager
    def attached(self, now: Now) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(block.observe(partial(self._see, now, index)))
            yield
        self._before.clear()

    def _see(self, now: Now, index: int, observation: Any) -> None:
        batch, cells = now()
        if len(observation.x_TH) != len(cells.cell):
            raise UnsupportedModelError(
                f"{self.blocks[index].name} was given {len(observation.x_TH)} tokens of a batch of {len(cells.cell)}: "
                "only models whose experts see the text's own tokens can be profiled"
            )
        at, previous = self._before.get(batch, (-1, None))
        view = View(observation, cells, self.blocks[index].num_experts, previous if at == index - 1 else None)
        # The batch waits between layers; ids as int32 on the CPU are the least it can carry along.
        self._before[batch] = (index, observation.routing.expert.int().cpu())
        if len(view.cell_T):
            for statistic in self._statistics[index].values():
                statistic.observe(view)

    def layers(self, domains: tuple[str, ...]) -> dict[str, LayerProfile]:
        """What was seen so far, layer by layer."""
        found = {}
        for block, statistics in zip(self.blocks, self._statistics, strict=True):
            results = {name: statistic.result() for name, statistic in statistics.items()}
            arrays = {name: array for name, array in results.items() if array is not None}
            found[block.name] = LayerProfile(block.name, block.layer, block.num_experts, block.top_k, domains, arrays)
        return found
