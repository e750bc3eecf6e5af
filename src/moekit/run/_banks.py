"""Experts of moekit's own formats, brought from disk one by one: they run as they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moekit.bank import ExpertBank
from moekit.blocks import MoEBlock
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.checkpoint.reader import Reader
from moekit.errors import UnsupportedModelError
from moekit.formats import NestedBank, PackedBank, with_tensors
from moekit.kernels import BankExperts
from moekit.kernels.rewrites import BitWidths
from moekit.run._pages import Pages, page_charge
from moekit.run._tier import Whole

_ALIGNED = 64
"""Tensors of an expert begin at multiples of this."""


class StoredRows(Whole):
    """Stored tensors brought from disk a row at a time: ``rows`` name the tensors that come and go together.

    ``bank`` has all of them as views of the pages; ``charge`` is the most memory each row takes, ``stored_bytes`` what
    is read for it.
    """

    def __init__(self, reader: Reader, layer: MoELayer, bank: ExpertBank, rows: Sequence[Sequence[str]]) -> None:
        self.name, self._reader = layer.name, reader
        self.num_experts = len(rows)
        self.charge: Sequence[int]
        self.stored_bytes: Sequence[int]
        self._tensors = [sorted(names) for names in rows]
        self._starts = [list(_starts([bank.tensors()[name].nbytes for name in names])) for names in self._tensors]
        self._pages = Pages([starts[-1] for starts in self._starts])
        on_disk = {n.rpartition(".experts.")[2]: n for t in layer.expert_tensors for n in t.stored.tensors.values()}
        self._on_disk = {name: on_disk[name] for names in self._tensors for name in names}
        views = dict(bank.tensors())
        for row, (names, starts) in enumerate(zip(self._tensors, self._starts, strict=True)):
            for name, start in zip(names, starts, strict=False):
                views[name] = self._pages.part(row, start, views[name].shape, views[name].dtype)
        self.bank = with_tensors(bank, views)
        self.charge = [page_charge(starts[-1]) if starts[-1] else 0 for starts in self._starts]
        self.stored_bytes = [sum(reader.info(self._on_disk[n]).nbytes for n in names) for names in self._tensors]

    def keep(self, expert: int) -> None:
        self._pages.keep(expert)

    def drop(self, expert: int) -> None:
        self._pages.drop(expert)

    def fill(self, expert: int) -> None:
        """Read one row from disk into its place. Raises :class:`CheckpointError` where the disk fails."""
        for name, start in zip(self._tensors[expert], self._starts[expert], strict=False):
            stored = self._on_disk[name]
            self._reader.read_into(self._pages.view(expert, start, start + self._reader.info(stored).nbytes), stored, 0)


class PagedBank(StoredRows):
    """The experts of one :class:`BankExperts`, a row each; its own parameters stay on the meta device, biases aside.

    ``run`` computes with them.
    """

    def __init__(self, checkpoint: Checkpoint, reader: Reader, layer: MoELayer, block: MoEBlock) -> None:
        assert isinstance(block.experts, BankExperts)
        check_packed(block)
        bank = block.experts.bank
        super().__init__(reader, layer, bank, [own_tensors(bank, expert) for expert in range(bank.num_experts)])
        self.run = block.experts.arriving(self.bank)


def check_packed(block: MoEBlock) -> None:
    """Raise :class:`UnsupportedModelError` where a stored format cannot be paged."""
    module = block.experts
    assert isinstance(module, BankExperts)
    bank = module.bank
    if not isinstance(bank, PackedBank | NestedBank):
        raise UnsupportedModelError(
            f"a {type(bank).__name__} shares tensors or is made ready as a whole, so its experts cannot be paged one "
            "by one: run this model in memory"
        )
    nested = isinstance(bank, NestedBank) and module.slots is None and isinstance(module.rewrite, BitWidths)
    if module.rewrite is not None and not nested and module.rewrite.runs(bank) is not bank:
        raise UnsupportedModelError(
            f"{block.name} computes with experts it makes of the stored ones: run this model in memory"
        )


def packed_parameters(block: MoEBlock) -> list[str]:
    """The parameters of a packed block that are paged."""
    assert isinstance(block.experts, BankExperts)
    bank = block.experts.bank
    return [name for expert in range(bank.num_experts) for name in own_tensors(bank, expert)]


def packed_charge(block: MoEBlock) -> int:
    """The most memory that one expert of a packed block takes."""
    assert isinstance(block.experts, BankExperts)
    bank = block.experts.bank
    rows = [[bank.tensors()[n].nbytes for n in own_tensors(bank, e)] for e in range(bank.num_experts)]
    apart = max(bank.bits) if isinstance(bank, NestedBank) else 1  # planes come and go on their own
    return max(page_charge(list(_starts(sizes))[-1]) for sizes in rows) + (apart - 1) * page_charge(1)


def own_tensors(bank: ExpertBank, expert: int) -> list[str]:
    """The tensors of one expert; biases are small and are copied by kernels, so they stay in memory."""
    return [n for n in bank.tensors() if n.startswith(f"{expert}.") and not n.endswith(".bias")]


def _starts(sizes: list[int]) -> Iterator[int]:
    """Where tensors of these sizes begin in a row, and at last where the row ends."""
    at = 0
    for size in sizes:
        yield at
        at = math.ceil((at + size) / _ALIGNED) * _ALIGNED
    yield at
