"""Byte ranges of tensors, read into fresh memory: nothing is mapped, so a tensor's pages go when it goes.

(A memory map keeps every page it touched for as long as any slice of it lives.)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moekit.checkpoint.headers import TensorInfo
from moekit.errors import CheckpointError

CHUNK = 1 << 24
"""Elements examined at a time when a tensor is scanned."""


class Reader:
    """Reads tensors, and rows of tensors, from the files of one folder; counts every byte in ``counted_bytes``."""

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.infos = infos
        self.counted_bytes = 0
        self._lock = threading.Lock()

    def info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self.infos[name]

    def read(self, name: str) -> Tensor:
        """One whole tensor, as stored."""
        info = self.info(name)
        return self._elements(info, 0, info.numel).view(info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of axis 0, as stored: only their bytes are read."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(f"{name} has {info.shape[0]} rows, rows {start} to {stop} were asked for")
        width = math.prod(info.shape[1:])
        return self._elements(info, start * width, stop * width).view(stop - start, *info.shape[1:])

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's elements in order, flat, at most :data:`CHUNK` at a time."""
        info = self.info(name)
        for start in range(0, info.numel, CHUNK):
            yield self._elements(info, start, min(start + CHUNK, info.numel))

    def _elements(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        size = info.dtype.itemsize
        data = torch.empty((stop - start) * size, dtype=torch.uint8)
        self._fill(memoryview(data.numpy()), info, info.offset + start * size)
        return data.view(info.dtype)

    def _fill(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        path = self.folder / info.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(f"{path} ends before {info.name} does: it was changed while in use")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        with self._lock:
            self.counted_bytes += len(view)
