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

from moekit.checkpoint.direct import DirectFile
from moekit.checkpoint.headers import TensorInfo
from moekit.errors import CheckpointError

CHUNK = 1 << 24
"""Elements examined at a time when a tensor is scanned."""


class Reader:
    """Reads tensors, and rows of tensors, from the files of one folder; counts every byte in ``counted_bytes``.

    ``direct`` reads past the operating system's page cache and keeps the files open: for whoever reads the same bytes
    again and again and must not fill memory with copies that nobody counts. Any thread may read.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], direct: bool = False) -> None:
        self.folder = folder
        self.infos = infos
        self.direct = direct
        self.counted_bytes = 0
        self._lock = threading.Lock()
        self._open: dict[str, DirectFile] = {}

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

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill ``view`` with the stored bytes of a tensor, from its byte ``start`` on."""
        info = self.info(name)
        self._fill(view, info, info.offset + start)

    def _fill(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        path = self.folder / info.file
        try:
            done = self._read_direct(info.file, view, offset) if self.direct else _read(path, view, offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if done < len(view):
            raise CheckpointError(f"{path} ends before {info.name} does: it was changed while in use")
        with self._lock:
            self.counted_bytes += len(view)

    def _read_direct(self, name: str, view: memoryview, offset: int) -> int:
        with self._lock:
            if name not in self._open:
                self._open[name] = DirectFile(self.folder / name)
            file = self._open[name]
        done = file.read_into(view, offset)
        if file.changed():
            raise CheckpointError(f"{file.path} was changed while in use: stop whoever writes to it and start again")
        return done

    def close(self) -> None:
        """Give back the files that are kept open; a later read opens them again."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()


def _read(path: Path, view: memoryview, offset: int) -> int:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                break
            done += count
    return done
