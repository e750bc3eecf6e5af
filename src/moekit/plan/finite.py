"""Damaged weights are refused where they are read, by name, before they spread into an output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.checkpoint.shards import Lazy
from moekit.errors import CheckpointError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

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
