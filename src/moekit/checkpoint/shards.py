"""Writing safetensors files as a stream: one tensor in memory at a time, hashed as it passes, the same bytes always.

The safetensors library needs every tensor of a file at once; the format itself needs only names, dtypes and shapes
before the first byte of data. Tensors are laid out widest dtype first, then by name, so that each one is aligned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.errors import OutputError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


class Lazy(NamedTuple):
    """A tensor known by dtype and shape, made only when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Written(NamedTuple):
    """What a file holds of one tensor, with the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str


def as_lazy(tensor: Tensor | Lazy) -> Lazy:
    if isinstance(tensor, Lazy):
        return tensor
    return Lazy(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def layout(tensors: Mapping[str, Tensor | Lazy]) -> list[tuple[str, Lazy]]:
    """The order in which a file holds its tensors."""
    lazies = [(name, as_lazy(tensor)) for name, tensor in tensors.items()]
    return sorted(lazies, key=lambda item: (-item[1].dtype.itemsize, item[0]))


def split(ordered: Sequence[tuple[str, Lazy]], max_bytes: int) -> Iterator[list[tuple[str, Lazy]]]:
    """Consecutive runs of at most ``max_bytes`` (a single larger tensor has a file of its own); at least one run."""
    run: list[tuple[str, Lazy]] = []
    size = 0
    for name, lazy in ordered:
        if run and size + lazy.nbytes > max_bytes:
            yield run
            run, size = [], 0
        run.append((name, lazy))
        size += lazy.nbytes
    yield run


def header_of(ordered: Iterable[tuple[str, Lazy]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, lazy in ordered:
        if lazy.dtype not in DTYPE_NAMES:
            raise OutputError(f"tensor {name} has dtype {lazy.dtype}, which the safetensors format cannot hold")
        span = [offset, offset + lazy.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, ordered: Sequence[tuple[str, Lazy]]) -> dict[str, Written]:
    """Write one safetensors file, flushed to the disk before returning.

    Raises:
        OSError: the disk is full or the path cannot be written; the caller says so in words.
        OutputError: a dtype the format does not know.
    """
    written = {}
    with path.open("wb") as file:
        file.write(header_of(ordered))
        for name, lazy in ordered:
            tensor = lazy.make()
            made = (tensor.dtype, tuple(tensor.shape))
            assert made == (lazy.dtype, lazy.shape), f"{name}: announced {lazy.dtype} {lazy.shape}, made {made}"
            data = raw_bytes(tensor)
            file.write(data)
            digest = hashlib.sha256(data).hexdigest()
            written[name] = Written(DTYPE_NAMES[lazy.dtype], lazy.shape, lazy.nbytes, digest)
            del tensor, data
        file.flush()
        os.fsync(file.fileno())
    return written
