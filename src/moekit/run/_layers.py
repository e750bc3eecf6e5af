"""The experts of one layer, brought from disk one by one into the place where kernels read them.

Shapes by suffix: E experts, I intermediate size, H hidden size, G = 2I if gated else I.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moekit.blocks import MoEBlock
from moekit.checkpoint import Checkpoint, ExpertTensor, MoELayer
from moekit.checkpoint.banks import read_bank
from moekit.checkpoint.reader import Reader
from moekit.errors import UnsupportedModelError
from moekit.kernels import Arrivals, ArrivingExperts, is_decorated
from moekit.run._pages import Pages, page_charge
from moekit.run._tier import Whole


@dataclass(frozen=True)
class _Copy:
    """Bytes on disk that are bytes in memory: of tensor ``name`` from ``start`` on, to ``low``..``high`` of a row."""

    part: str
    name: str
    start: int
    low: int
    high: int


class PagedExperts(Whole):
    """The stacked weights of one experts module, in the layout its family has in memory.

    The module's own parameters stay on the meta device, so that whoever reads them past the store fails loudly.
    ``weights`` are its places, by name [E, ...], and ``run`` computes with them; ``charge`` is the most memory each
    expert takes, ``stored_bytes`` what is read for it.

    Raises:
        UnsupportedModelError: experts that do not lie stacked behind transformers' shared contract.
    """

    def __init__(self, checkpoint: Checkpoint, reader: Reader, layer: MoELayer, block: MoEBlock) -> None:
        self.name, self.num_experts = layer.name, block.num_experts
        self._checkpoint, self._reader, self._layer, self._layout = checkpoint, reader, layer, block.layout
        module: Any = block.experts
        check(block)
        self._pages: dict[str, Pages] = {}
        shell = copy.copy(module)
        shell._parameters = dict(module._parameters)
        for name in stacked(module):
            weight = getattr(module, name)
            self._pages[name] = Pages([weight[0].numel() * weight.element_size()] * len(weight))
            tensor = self._pages[name].tensor(weight.shape[1:], weight.dtype)
            shell._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self.run: Callable[[Tensor, Tensor, Tensor, Arrivals], Tensor] = ArrivingExperts(shell)
        self.weights = {name: shell._parameters[name].data for name in self._pages}
        self.charge: Sequence[int] = [charge(block)] * self.num_experts
        self._copies = self._as_they_are()
        self.stored_bytes: Sequence[int] = [self._bytes_on_disk()] * self.num_experts

    def keep(self, expert: int) -> None:
        for pages in self._pages.values():
            pages.keep(expert)

    def drop(self, expert: int) -> None:
        for pages in self._pages.values():
            pages.drop(expert)

    def fill(self, expert: int) -> None:
        """Read one expert from disk into its rows. Raises :class:`CheckpointError` where the disk fails."""
        if self._copies is not None:
            for piece in self._copies[expert]:
                view = self._pages[piece.part].view(expert, piece.low, piece.high)
                self._reader.read_into(view, piece.name, piece.start)
            return
        dtype = next(iter(self.weights.values())).dtype
        activation = self._layout.activation()
        bank = read_bank(self._reader, self._checkpoint.scheme, self._layer, activation, [expert], dtype)
        layout: Any = self._layout
        for name, value in layout.oriented(bank).items():
            if name in self.weights:
                self.weights[name][expert].copy_(value[0])

    def _bytes_on_disk(self) -> int:
        """Of one expert (the mean, where they differ)."""
        infos, names = self._checkpoint.tensors, [t.stored.tensors.values() for t in self._layer.expert_tensors]
        return -(-sum(infos[name].nbytes for group in names for name in group) // self.num_experts)

    def _as_they_are(self) -> list[list[_Copy]] | None:
        """By expert, where its bytes lie, if they are on disk as in memory; None if they must be turned or decoded."""
        found = [[self._copy(tensor, expert) for tensor in self._weight_tensors(expert)] for expert in self._experts]
        sizes = {sum(piece.high - piece.low for piece in pieces if piece) for pieces in found}
        whole = sizes == {sum(int(pages.ends[1]) for pages in self._pages.values())}
        return [[p for p in pieces if p] for pieces in found] if whole else None

    def _copy(self, tensor: ExpertTensor, expert: int) -> _Copy | None:
        layout: Any = self._layout
        name = "down_proj" if tensor.part == "down" else layout.up_name
        row, info = int(self._pages[name].ends[1]), self._checkpoint.tensors[tensor.name]
        half = tensor.part in ("gate", "up") and layout.gated
        low, high = {"gate": (0, row // 2), "up": (row // 2, row)}[tensor.part] if half else (0, row)
        size = info.nbytes * tensor.rows // info.shape[0] if tensor.expert is None else info.nbytes
        plain = set(tensor.stored.tensors) == {"weight"} and info.dtype == self.weights[name].dtype
        turned = tensor.transposed != layout.transposed
        mixed = name != "down_proj" and tensor.interleaved != layout.interleaved
        apart = half and (layout.transposed or layout.interleaved)
        if not plain or turned or mixed or apart or tensor.canonical or size != high - low:
            return None
        return _Copy(name, tensor.name, size * expert if tensor.expert is None else 0, low, high)

    def _weight_tensors(self, expert: int) -> Iterator[ExpertTensor]:
        return (tensor for tensor in self._layer.of(expert) if not tensor.part.endswith("_bias"))

    @property
    def _experts(self) -> range:
        return range(self.num_experts)


def check(block: MoEBlock) -> None:
    """Raise :class:`UnsupportedModelError` where a block's experts cannot be paged."""
    if not is_decorated(block.experts) or not hasattr(block.layout, "oriented"):
        raise UnsupportedModelError(
            f"{type(block.experts).__name__} keeps its experts in a way that cannot be paged one by one: "
            "run this model in memory, or layer by layer with --max-ram"
        )


def stacked(module: Any) -> Sequence[str]:
    """The parameters of an experts module that are paged; its biases stay in memory."""
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]


def charge(block: MoEBlock) -> int:
    """The most memory that one expert of a block takes in its pages."""
    weights = [getattr(block.experts, name) for name in stacked(block.experts)]
    return sum(page_charge(weight[0].numel() * weight.element_size()) for weight in weights)
