"""Address space for all experts of a layer, memory only for those that are there."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

HUGE = 2**21
"""Bytes of a huge page. Filling one from a disk past the page cache takes 1.2 to 1.9 times less time than filling its
512 small pages, and half the processor's (measured, one to four threads, rows of 4 and 8 MiB)."""


class Pages:
    """Rows of ``sizes`` bytes each, end to end: a stacked tensor whose rows come and go one by one.

    Large rows are asked to lie in huge pages as far as those are all their own: one that held a neighbour's bytes too
    would keep memory that nobody counts. A page that two rows share stays as long as either is there. What was dropped
    reads as zero. Not thread-safe: whoever owns it holds a lock around :meth:`keep` and :meth:`drop`; rows that are
    kept may be written from any thread.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.ends = np.cumsum([0, *sizes])
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._map = mmap.mmap(-1, max(int(self.ends[-1]), 1) + HUGE, flags=flags)
        self._base = -torch.frombuffer(self._map, dtype=torch.uint8).data_ptr() % HUGE
        with suppress(AttributeError, OSError):  # a system or kernel without huge pages, or no ranges left
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
            for start, stop in self._huge():
                self._map.madvise(mmap.MADV_HUGEPAGE, self._base + start, stop - start)
        self._kept = np.zeros(len(sizes), dtype=bool)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """All rows, which must be of one size, as one tensor [rows, *shape]."""
        rows = len(self._kept)
        return torch.frombuffer(self._map, dtype=dtype, count=rows * math.prod(shape), offset=self._base).view(
            rows, *shape
        )

    def part(self, row: int, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What lies from byte ``start`` of a row on, as a tensor."""
        offset = self._base + int(self.ends[row]) + start
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(*shape)

    def view(self, row: int, start: int, stop: int) -> memoryview:
        """Bytes ``start`` to ``stop`` of a row, to be filled."""
        begin = self._base + int(self.ends[row])
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
            self._map.madvise(mmap.MADV_DONTNEED, self._base + start, last * mmap.PAGESIZE - start)

    def _huge(self) -> list[tuple[int, int]]:
        """Ranges of huge pages that are a single row's, or none unless they hold half of all bytes: each range that
        begins anew takes two of the 65,530 that a process can have."""
        if not (self.ends % HUGE).any():
            return [(0, int(self.ends[-1]))]
        first, last = -(-self.ends[:-1] // HUGE) * HUGE, self.ends[1:] // HUGE * HUGE
        found = [(low, high) for low, high in zip(first.tolist(), last.tolist(), strict=True) if low < high]
        return found if 2 * sum(high - low for low, high in found) >= self.ends[-1] else []

    def _shared(self, page: int) -> bool:
        """Whether a page holds anything of a row that is kept."""
        low = int(np.searchsorted(self.ends, page * mmap.PAGESIZE, side="right")) - 1
        high = int(np.searchsorted(self.ends, (page + 1) * mmap.PAGESIZE, side="left"))
        return bool(self._kept[low:high].any())


def page_charge(row_bytes: int) -> int:
    """The most memory that one row may take: its bytes, and the rest of the pages at both ends."""
    return row_bytes + (0 if row_bytes % mmap.PAGESIZE == 0 else 2 * mmap.PAGESIZE - 1)
