"""The statistics of every MoE layer, fed while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.errors import UnsupportedModelError
from moekit.profile._figures import make
from moekit.profile._reservoir import Quota, Reservoir
from moekit.profile._view import Cells, View
from moekit.profile.layer import LayerProfile
from moekit.profile.schema import FIELDS
from moekit.profile.statistics import Room, Statistic

Now = Callable[[], tuple[int, Cells]]
"""Which batch is running, and what its tokens count towards."""


def kept_bytes(blocks: Sequence[MoEBlock], names: Sequence[str], quota: Quota, tokens: int | None = None) -> int:
    """Bytes that second moments and samples of all layers can come to over so many tokens (None: over any number);
    every other sum is small beside a layer."""
    return sum(_moment_bytes(block, names) + _sample_bytes(block, names, quota, tokens) for block in blocks)


def _moment_bytes(block: MoEBlock, names: Sequence[str]) -> int:
    square = block.hidden_size**2 * 8
    return square * (("input_moments" in names) + block.num_experts * ("expert_moments" in names))


def _sample_bytes(block: MoEBlock, names: Sequence[str], quota: Quota, tokens: int | None) -> int:
    if not samples_wanted(names):
        return 0
    widths = {"hidden": block.hidden_size, "sample_logits": block.num_experts, "sample_weight": block.top_k}
    width = sum(size for name, size in widths.items() if name in names) + block.top_k + 3
    most = quota.most(block.num_experts, block.top_k)
    return (most if tokens is None else min(tokens, most)) * width * 4


def samples_wanted(names: Sequence[str]) -> bool:
    """Whether any of these statistics is of sampled tokens."""
    return any(FIELDS[name].axes[0] == "s" for name in names)


class Watch:
    """One set of statistics per block; ``attached`` observes the blocks as long as it is open."""

    def __init__(
        self, blocks: Sequence[MoEBlock], names: Sequence[str], num_domains: int, quota: Quota, num_traced: int
    ) -> None:
        self.blocks, self._num_domains = list(blocks), num_domains
        self._samples_wanted = samples_wanted(names)
        self._before: dict[int, tuple[int, Tensor]] = {}
        self._statistics: list[dict[str, Statistic]] = []
        self._samples: list[Reservoir] = []
        for index, block in enumerate(self.blocks):
            previous = self.blocks[index - 1].num_experts if index else 0
            self._samples.append(Reservoir(quota.tokens, quota.each(block.num_experts, block.top_k)))
            room = Room(block.num_experts, num_domains, previous, num_traced, self._samples[-1])
            self._statistics.append({name: make(name, room) for name in names})

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
            self._admit(index, view)
            for statistic in self._statistics[index].values():
                statistic.observe(view)

    def _admit(self, index: int, view: View) -> None:
        """Let the reservoir choose, so that all statistics of the sample keep the same tokens."""
        if self._samples_wanted and view.priority_T is not None:
            domain_T, expert_TK = view.domain_T(self._num_domains).cpu(), view.expert_TK.cpu()
            view.sampled = self._samples[index].admit(view.priority_T, domain_T.numpy(), expert_TK.numpy())

    def layers(self, domains: tuple[str, ...]) -> dict[str, LayerProfile]:
        """What was seen so far, layer by layer."""
        found = {}
        for block, statistics in zip(self.blocks, self._statistics, strict=True):
            results = {name: statistic.result() for name, statistic in statistics.items()}
            arrays = {name: array for name, array in results.items() if array is not None}
            found[block.name] = LayerProfile(block.name, block.layer, block.num_experts, block.top_k, domains, arrays)
        return found
