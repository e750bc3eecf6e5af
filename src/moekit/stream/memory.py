"""What the operating system says this process holds, and the promise of ``--max-ram``.

The figures are the kernel's own: resident set now (VmRSS) and the largest it ever was (VmHWM), file-backed pages
included. A cap is a promise about the second, so everything that was resident before the work began counts too.
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moekit.errors import BudgetError, OptionError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_M_MMAP_THRESHOLD = -3
_DRIFT = 24 * 10**6
"""How much more the same program may hold when it is started again with the cap that a message named."""
SLACK = 96 * 10**6
"""Bytes set aside for what no estimate sees: Python objects, allocator fragments, thread stacks."""


def parse_bytes(size: int | float | str) -> int:
    """Bytes of ``3e9``, ``"3GB"``, ``"3.5 GiB"`` or ``"800M"``; decimal units unless spelled with an i.

    Raises :class:`OptionError` where the text is no size or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
    if match is None or (match[2] not in _UNITS) or float(match[1]) <= 0:
        raise OptionError(f"'{size}' is no amount of memory: give bytes or a size such as 3GB, 800MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def gigabytes(size: float) -> str:
    """``size`` bytes as people read them: GB of 10^9 with one decimal, MB below a tenth of one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def rss() -> int:
    """Bytes resident now."""
    return _status("VmRSS") or peak_rss()


def peak_rss() -> int:
    """The most bytes this process ever had resident at once, file-backed pages included."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def free_memory() -> int:
    """Bytes that programs can still take without swapping, as the kernel estimates it; 8 GiB where it does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 8 * 2**30


@cache
def _libc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "malloc_trim") else None


def trim() -> None:
    """Hand freed heap pages back to the operating system (glibc keeps them otherwise)."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def return_freed_tensors() -> None:
    """From now on let every tensor above 1 MiB live in pages of its own, given back the moment it is freed.

    glibc raises that threshold to 32 MiB as a program frees large blocks; under a cap the fragments that leaves cost
    more than the calls. A documented knob of the allocator, for the whole process.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@dataclass(frozen=True)
class Cap:
    """A limit in bytes on the resident set of the whole process; ``limit`` None is no limit."""

    limit: int | None = None

    def room(self) -> int | None:
        """Bytes that may still become resident, :data:`SLACK` aside; None where there is no limit."""
        return None if self.limit is None else self.limit - rss() - SLACK

    def require(self, need: int, what: str, named: int | None = None) -> None:
        """Refuse now, not halfway: raise :class:`BudgetError` unless ``need`` more bytes fit.

        The message names the smallest cap that works: what is resident already, plus the slack, plus ``need`` (or
        ``named``, where more than ``need`` will be wanted later on).
        """
        if self.limit is None:
            return
        if max(rss() + need + SLACK, peak_rss()) > self.limit:
            smallest = smallest_for(max(need, named or 0))
            raise BudgetError(
                f"a memory cap of {gigabytes(self.limit)} is too small: {what} needs {gigabytes(need)} beyond the "
                f"{gigabytes(rss())} the program itself holds; the smallest cap that works is {gigabytes_up(smallest)}"
            )


def smallest_for(need: int) -> int:
    """The smallest cap under which ``need`` more bytes fit: what is resident now may differ a little the next time."""
    return max(rss() + need + SLACK, peak_rss()) + _DRIFT


def gigabytes_up(size: int) -> str:
    """A size rounded up to what can be typed back as an option: whole MB."""
    return f"{-(-size // 10**6)}MB"


def cap(max_ram: int | float | str | Cap | None) -> Cap:
    """The cap a caller asked for: bytes, a size such as "3GB", or None for no limit."""
    if isinstance(max_ram, Cap):
        return max_ram
    if max_ram is None:
        return Cap()
    return_freed_tensors()
    return Cap(parse_bytes(max_ram))
