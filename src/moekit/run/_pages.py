"""Address space for all experts of a layer, memory only for those that are there."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Pages:
    """Rows of ``sizes`` bytes each, end to end: a stacked tensor whose rows come and go one by one.

    A page that two rows share stays as long as either is there. Not thread-safe: whoever owns it holds a lock around
    :meth:`keep` and :meth:`drop`; rows that are kept may be written from any thread. What was dropped reads as zero.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.ends = np.cumsum([0, *sizes])
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._map = mmap.mmap(-1, max(int(self.ends[-1]), 1), flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would hold neighbours that nobody counts
        self._kept = np.zeros(len(sizes), dtype=bool)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """All rows, which must be of one size, as one tensor [rows, *shape]."""
        rows = len(self._kept)
        return torch.frombuffer(self._map, dtype=dtype, count=rows * math.prod(shape)).view(rows, *shape)

    def part(self, row: int, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What lies from byte ``start`` of a row on, as a tensor."""
        offset = int(self.ends[row]) + start
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(*shape)

    def view(self, row: int, start: int, stop: int) -> memoryview:
        """Bytes ``start`` to ``stop`` of a row, to be filled."""
        begin = int(self.ends[row])
        return memoryview(self._map)[begin + start : begin + stop]

    def keep(self, row: int) -> None:
        """A row is about to be filled."""
        self._kept[row] = True

    def drop(self, row: int) -> None:
        """Give a row's memory back to the operating system."""
        self._kept[row] = False
        first, last = int(self.ends[row]) // mmap.PAGESIZE, -(-int(self.ends[row + 1]) // mmap.PAGESIZE)
        while first < last and self._shared(first):
            first += 1
        while first < last and self._shared(last - 1):
            last -= 1
        if first < last:
            start = first * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, min(last * mmap.PAGESIZE, len(self._map)) - start)

    def _shared(self, page: int) -> bool:
        """Whether a page holds anything of a row that is kept."""
        low = int(np.searchsorted(self.ends, page * mmap.PAGESIZE, side="right")) - 1
        high = int(np.searchsorted(self.ends, (page + 1) * mmap.PAGESIZE, side="left"))
        return bool(self._kept[low:high].any())


def page_charge(row_bytes: int) -> int:
    """The most memory that one row may take: its bytes, and the rest of the pages at both ends."""
    return row_bytes + (0 if row_bytes % mmap.PAGESIZE == 0 else 2 * mmap.PAGESIZE - 1)
