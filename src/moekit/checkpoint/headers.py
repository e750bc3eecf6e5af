"""Safetensors headers: what is in a file, read and checked without touching the data.

A file is eight bytes (the header's length, little endian), a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekit.checkpoint.shards import DTYPE_NAMES
from moekit.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_HEADER = 100_000_000
"""The format's own limit on a header's length, in bytes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` and ``nbytes`` in bytes from the start of ``file`` (a name in the folder)."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one local file.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return parse_header(lambda start, count: (file.seek(start), file.read(count))[1], size, path.name)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the download is incomplete, fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def parse_header(fetch: Callable[[int, int], bytes], size: int, file: str) -> dict[str, TensorInfo]:
    """Every tensor of a file of ``size`` bytes, of which ``fetch(start, count)`` returns a range."""
    prefix = fetch(0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or size < 8 + length or not 2 <= length <= MAX_HEADER:
        raise CheckpointError(
            f"{file} is no whole safetensors file: {size} bytes long, its header claims {length}; download it again"
        )
    try:
        header: Any = json.loads(fetch(8, length))
        if not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise CheckpointError(f"{file} is corrupt: its header is not JSON; download it again") from None
    start = 8 + length
    infos = {name: _info(name, entry, file, start) for name, entry in header.items() if name != "__metadata__"}
    _check_layout(sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)), file, start, size)
    return infos


def _info(name: str, entry: Any, file: str, start: int) -> TensorInfo:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} is corrupt: the header's entry for {name} is malformed") from None
    if kind not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {kind}, which moekit cannot read; known: {', '.join(DTYPES)}")
    info = TensorInfo(name, file, DTYPES[kind], shape, start + begin, end - begin)
    if info.numel * info.dtype.itemsize != info.nbytes:
        raise CheckpointError(f"{file} is corrupt: {name} ({kind} {list(shape)}) is given {info.nbytes} bytes")
    return info


def _check_layout(infos: list[TensorInfo], file: str, start: int, size: int) -> None:
    """Tensors follow one another from the header's end to the file's end: no overlap, no gap, nothing cut off."""
    end = start
    for info in infos:
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{file} is corrupt: {info.name} {what}")
        end += info.nbytes
    if end > size:
        raise CheckpointError(
            f"{file} is truncated: its header promises {end} bytes, the file has {size}; download it again"
        )
    if end < size:
        raise CheckpointError(f"{file} is corrupt: {size - end} bytes after the last tensor belong to none")


def join_headers(
    path: Path, headers: Mapping[str, Mapping[str, TensorInfo]], index: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """All tensors of all files, checked against the index.

    Raises:
        CheckpointError: a name in two files, or one that the index places where it is not.
    """
    tensors: dict[str, TensorInfo] = {}
    for file, infos in headers.items():
        for name, info in infos.items():
            if name in tensors:
                raise CheckpointError(f"{path}: {name} is in both {tensors[name].file} and {file}")
            tensors[name] = info
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{path}: the index places {name} in {file}, which does not hold it")
    if not tensors:
        raise CheckpointError(f"{path}: its weight files hold no tensor")
    return tensors
