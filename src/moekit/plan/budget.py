"""What a person asks for, a size, a memory or a ratio, as bytes of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.errors import BudgetError, OptionError
from moekit.plan.sizes import source_nbytes
from moekit.stream import gigabytes, parse_bytes

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

Size = int | float | str
CONTEXT = 4096


@dataclass(frozen=True)
class Budget:
    """``nbytes`` the output's weights may take, and what was asked for, in words."""

    nbytes: int
    asked: str


def budget_of(
    source: Checkpoint,
    *,
    size: Size | None = None,
    memory: Size | None = None,
    context: int | None = None,
    ratio: float | None = None,
) -> Budget:
    """The budget of exactly one of ``size`` (weights on disk), ``memory`` (weights and the key-value cache of one
    sequence of ``context`` tokens) and ``ratio`` (share of the bytes to remove).

    Raises:
        OptionError: none or several of them, or one out of range. BudgetError: the cache alone is more than the memory.
    """
    if sum(given is not None for given in (size, memory, ratio)) != 1:
        raise OptionError("give exactly one budget: a size, a memory (with a context) or a ratio")
    if context is not None and memory is None:
        raise OptionError("a context counts towards a memory budget; give a memory with it")
    if ratio is not None:
        if not 0 <= ratio < 1:
            raise OptionError(f"ratio={ratio} is no share of the bytes to remove; give one from 0 up to below 1")
        return Budget(int(source_nbytes(source) * (1 - ratio)), f"{ratio:.0%} of the bytes removed")
    if size is not None:
        return Budget(parse_bytes(size), f"{gigabytes(parse_bytes(size))} of weights")
    return _memory(source, parse_bytes(memory or 0), CONTEXT if context is None else context)


def _memory(source: Checkpoint, memory: int, context: int) -> Budget:
    if context < 1:
        raise OptionError(f"context={context} must be at least 1 token")
    cache = source.summary().kv_bytes(context)
    asked = f"{gigabytes(memory)} of memory with a context of {context} tokens ({gigabytes(cache)} of cache)"
    if cache >= memory:
        raise BudgetError(f"{asked}: the cache alone is too large; give a shorter context or more memory")
    return Budget(memory - cache, asked)
