"""Damaged weights are refused where they are read, by name, before they spread into an output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.checkpoint.reader import Reader
from moekit.checkpoint.shards import Lazy
from moekit.errors import CheckpointError
from moekit.formats import DenseBank

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer

_CHUNK = 1 << 24


def finite(tensor: Tensor, name: str) -> Tensor:
    """``tensor`` itself.

    Raises:
        CheckpointError: it holds a NaN or an infinity.
    """
    if tensor.dtype.is_floating_point and tensor.numel():
        for chunk in tensor.reshape(-1).split(_CHUNK):
            # Extremes are far cheaper than a test of each element; a NaN anywhere becomes both of them.
            extremes = torch.stack(torch.aminmax(chunk.float() if chunk.dtype.itemsize == 1 else chunk))
            if not bool(torch.isfinite(extremes).all()):
                what = "NaN" if bool(torch.isnan(extremes).any()) else "infinite"
                raise CheckpointError(f"{name} holds {what} values: the weights are damaged, fetch the file again")
    return tensor


def copied(checkpoint: Checkpoint, name: str) -> Lazy:
    """A tensor of the source, byte for byte."""
    info = checkpoint.tensors[name]
    return Lazy(info.dtype, info.shape, lambda: finite(checkpoint.read(name), name))


def finite_experts(checkpoint: Checkpoint, layer: MoELayer, experts: Sequence[int], bank: DenseBank) -> DenseBank:
    """``bank`` itself, which holds these experts as they were read.

    Raises:
        CheckpointError: one of them holds a NaN or an infinity; names the tensor as it lies in the file.
    """
    try:
        for part, tensor in bank.tensors().items():
            finite(tensor, f"{layer.name}, decoded {part} of experts {', '.join(map(str, experts))}")
    except CheckpointError:
        for name, piece in _as_stored(checkpoint, layer, experts):
            finite(piece, name)
        raise
    return bank


def _as_stored(checkpoint: Checkpoint, layer: MoELayer, experts: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """What these experts were read from, as it lies in the files: only their rows where experts are stacked."""
    for tensor in layer.expert_tensors:
        for name in tensor.stored.tensors.values():
            info = checkpoint.tensors[name]
            if tensor.expert in experts:
                yield name, checkpoint.read(name)
            elif tensor.expert is None and info.shape and info.shape[0] % layer.num_experts == 0:
                rows, reader = info.shape[0] // layer.num_experts, Reader(checkpoint.path, {name: info})
                for expert in experts:
                    yield f"{name} (expert {expert})", reader.rows(name, expert * rows, (expert + 1) * rows)
