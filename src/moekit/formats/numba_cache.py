"""Where Numba can write, what it compiles stays on disk; only to be imported where Numba is installed."""

from __future__ import annotations

from numba.core.caching import FunctionCache


def _probe() -> None:
    """A function of this package, kept where all of them are."""


def _keeps() -> bool:
    try:
        FunctionCache(_probe)
    except RuntimeError:  # neither beside the source nor in the user's cache: a read-only system without a home
        return False
    return True


KEEPS = _keeps()
"""What to give as ``cache``: where it cannot keep a function, Numba raises. Each process then compiles anew."""
