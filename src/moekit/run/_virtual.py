"""Address space for many rows, with memory from a file that has no name: rows come, go, and are shared by processes.

What is mapped is counted where it lies (the blocks of the file), not by what processes seem to hold.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moekit.errors import BudgetError, OptionError

_ANYWHERE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
_FIXED, _NO_HUGE_PAGES, _PUNCH_HOLE = 0x10, 15, 0x03
_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "mmap"):
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Frames:
    """Physical memory in frames of ``page`` bytes, all in one nameless file (``fd``) that other processes may map.

    Raises:
        OptionError: no Linux, or a page that is no multiple of the machine's.
    """

    def __init__(self, page: int = mmap.PAGESIZE) -> None:
        if not hasattr(os, "memfd_create"):
            raise OptionError("experts in shared virtual memory need Linux (memfd_create): this system has none")
        if page < 1 or page % mmap.PAGESIZE:
            raise OptionError(f"pages of {page} bytes: expected a multiple of this machine's {mmap.PAGESIZE}")
        self.page = page
        self.fd = os.memfd_create("moekit-experts", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        self._gaps: list[tuple[int, int]] = []
        self._end = 0

    def take(self, count: int) -> int:
        """The first of ``count`` frames in a row, with memory. Raises :class:`BudgetError` where there is none."""
        place = next((i for i, (_, size) in enumerate(self._gaps) if size >= count), None)
        first = self._end if place is None else self._gaps[place][0]
        try:
            os.posix_fallocate(self.fd, first * self.page, count * self.page)
        except OSError as error:
            _punch(self.fd, first * self.page, count * self.page)
            raise BudgetError(f"no memory for {count * self.page} bytes more of experts: {error.strerror}") from None
        if place is None:
            self._end += count
        else:
            size = self._gaps[place][1]
            self._gaps[place : place + 1] = [(first + count, size - count)] if size > count else []
        return first

    def give(self, first: int, count: int) -> None:
        """Frames back to the operating system. Nobody may read them any more."""
        _punch(self.fd, first * self.page, count * self.page)
        bisect.insort(self._gaps, (first, count))
        merged: list[tuple[int, int]] = []
        for start, size in self._gaps:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._gaps = merged

    @property
    def physical_bytes(self) -> int:
        """Memory held, whoever maps it."""
        return os.fstat(self.fd).st_blocks * 512


class Reserved:
    """``size`` bytes of addresses. What is not mapped reads as zero, holds no memory and must not be written.

    The addresses stay as long as :attr:`buffer`, or a tensor over it, does.
    """

    def __init__(self, size: int) -> None:
        self._address = _mapped(None, max(size, 1), mmap.PROT_READ, _ANYWHERE, -1, 0)
        self.buffer = (ctypes.c_char * max(size, 1)).from_address(self._address)
        weakref.finalize(self.buffer, _libc.munmap, self._address, max(size, 1))

    def map(self, start: int, size: int, fd: int, offset: int) -> None:
        """Put ``size`` bytes of a file at ``start``; both and ``offset`` are multiples of the machine's page."""
        both = mmap.PROT_READ | mmap.PROT_WRITE
        address = _mapped(self._address + start, size, both, mmap.MAP_SHARED | _FIXED, fd, offset)
        _libc.madvise(address, size, _NO_HUGE_PAGES)  # a huge page would hold neighbours that nobody counts

    def unmap(self, start: int, size: int) -> None:
        """Take away what was mapped; the addresses stay reserved."""
        _mapped(self._address + start, size, mmap.PROT_READ, _ANYWHERE | _FIXED, -1, 0)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """From the first byte on."""
        return torch.frombuffer(self.buffer, dtype=dtype, count=math.prod(shape)).view(*shape)


class VirtualRows:
    """One stacked ``tensor`` [rows, *shape] of which only the rows that are kept have memory, from ``frames``.

    A page that neighbours share is there as long as one of them is. Rows must be written before they are read, and
    rows that are not kept read as zero. Not thread-safe.
    """

    def __init__(self, frames: Frames, rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.frames, self.row_bytes = frames, math.prod(shape) * dtype.itemsize
        pages = -(-rows * self.row_bytes // frames.page)
        self._space = Reserved(pages * frames.page)
        self.tensor = self._space.tensor(dtype, (rows, *shape))
        self._users = np.zeros(pages, np.int64)
        self._frame = np.full(pages, -1, np.int64)

    def keep(self, row: int) -> None:
        """Memory for a row that has none. Raises :class:`BudgetError`, and nothing has changed, for want of it."""
        pages = self._pages(row)
        new = [page for page in pages if not self._users[page]]
        if new:
            # Neighbours can have brought only the outermost pages: what is new lies in a row.
            first, page = self.frames.take(len(new)), self.frames.page
            self._space.map(new[0] * page, len(new) * page, self.frames.fd, first * page)
            self._frame[new] = first + np.arange(len(new))
        self._users[pages] += 1

    def drop(self, row: int) -> None:
        """Give back the memory of a row that is kept, as far as no neighbour shares it."""
        pages, page = self._pages(row), self.frames.page
        self._users[pages] -= 1
        for old in (one for one in pages if not self._users[one]):
            self._space.unmap(old * page, page)
            self.frames.give(int(self._frame[old]), 1)
            self._frame[old] = -1

    def _pages(self, row: int) -> range:
        start, page = row * self.row_bytes, self.frames.page
        return range(start // page, -(-(start + self.row_bytes) // page))


def _mapped(address: int | None, size: int, access: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address, size, access, flags, fd, offset)
    if found == ctypes.c_void_p(-1).value:
        raise BudgetError(f"cannot map {size} bytes of experts: {os.strerror(ctypes.get_errno())}")
    return int(found)


def _punch(fd: int, offset: int, size: int) -> None:
    _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(size))
