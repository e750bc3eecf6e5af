"""Reading a file past the operating system's page cache, so that what is read twice is fetched twice."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np

ALIGNED = 4096
"""Offsets, lengths and addresses of direct reads are multiples of this (the block size of every usual file system)."""
BITE = 4 * 2**20
"""Bytes fetched by one call, into a buffer that each thread has of its own."""
_OWN = threading.local()


class DirectFile:
    """One open file. Without direct reads (other systems, file systems in memory) pages are dropped after each read.

    Raises:
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd, self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except (OSError, AttributeError):
            self._fd, self.direct = os.open(path, os.O_RDONLY), False
        self._state = self._now()

    def changed(self) -> bool:
        """Whether the file was written to since it was opened."""
        return self._now() != self._state

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` with what lies from ``offset`` on; the bytes there were, fewer where the file ends before."""
        buffer, target, done = _buffer(), np.frombuffer(view, np.uint8), 0
        while done < len(target):
            skip = (offset + done) % ALIGNED
            wanted = min(BITE, skip + len(target) - done)
            room = memoryview(buffer)[: -(-wanted // ALIGNED) * ALIGNED]
            count = min(os.preadv(self._fd, [room], offset + done - skip), wanted) - skip
            if count <= 0:
                break
            target[done : done + count] = np.frombuffer(buffer, np.uint8, count, skip)
            done += count
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, len(target), os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


def _buffer() -> mmap.mmap:
    """This thread's buffer; maps are aligned to pages."""
    if not hasattr(_OWN, "buffer"):
        _OWN.buffer = mmap.mmap(-1, BITE + ALIGNED)
    return _OWN.buffer
