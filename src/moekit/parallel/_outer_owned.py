"""Workers that each train some of the experts: the others are copies, without gradients and without optimiser state.

E experts in a layer, W workers; worker w owns experts [w E / W, (w + 1) E / W) of every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from moekit.blocks import MoEBlock, blocks
from moekit.errors import OptionError
from moekit.parallel._codec import Codec
from moekit.parallel._outer_fragments import Owned
from moekit.train.forms import Frozen
from moekit.train.parametrise import held, parametrise, settle


class Ownership:
    """A model whose experts are held as one worker's own and the copies of the others', until :meth:`settle`.

    Raises :class:`OptionError` where a layer's experts cannot be dealt evenly, ``UnsupportedModelError`` where they are
    not kept in stacks.
    """

    def __init__(self, model: nn.Module, rank: int, world: int) -> None:
        self.rank, self.world, self.blocks = rank, world, blocks(model)
        for block in self.blocks:
            if block.num_experts % world or world < 2:
                raise OptionError(
                    f"{block.name} has {block.num_experts} experts for {world} workers: choose a number of workers "
                    f"above 1 that divides {block.num_experts}"
                )
            own = self.span(block, rank)
            others = [e for e in range(block.num_experts) if e not in own]
            parametrise(block, partial(Frozen, others))

    def span(self, block: MoEBlock, worker: int) -> range:
        """The experts that a worker owns."""
        each = block.num_experts // self.world
        return range(worker * each, (worker + 1) * each)

    def parts(self, block: MoEBlock) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(gate, up or down; this worker's own [E / W, R, K]; copies of all [E, R, K], of which its own are stale)."""
        for part, form, (own,) in held(block):
            assert isinstance(form, Frozen)
            yield part, own, form.weight

    def trained(self) -> list[Tensor]:
        """This worker's own experts, of all layers."""
        return [own for block in self.blocks for _, own, _ in self.parts(block)]

    def fragment(self, codec: Codec) -> Owned:
        """What brings the copies up to date."""
        places = [
            [copies[self.span(block, w).start : self.span(block, w).stop] for block, copies in self._copies()]
            for w in range(self.world)
        ]
        return Owned("experts", self.trained(), places, self.rank, codec)

    def settle(self) -> None:
        """Plain weights again: its own and the copies."""
        for block in self.blocks:
            settle(block)

    def _copies(self) -> Iterator[tuple[MoEBlock, Tensor]]:
        return ((block, copies) for block in self.blocks for _, _, copies in self.parts(block))
