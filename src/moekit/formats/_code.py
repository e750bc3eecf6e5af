"""The dictionary code of ternary weights: fixed 16-bit codes, each for the longest run of weights it can name.

A weight is a symbol: 0 is zero, 1 the row's low level, 2 its high level. The dictionary holds the 2**16 most probable
runs of whole pairs of weights, up to 14 pairs, of a source with P(0) = 0.885 and P(1) = P(2) = 0.0575. Runs are equally
probable where they agree in length and number of zeros; the last such class that fits only in part gives its first
runs in lexicographic order, so that the dictionary is the same on every machine: it is part of the file format.
Every prefix of a run is in the dictionary, hence a row is coded greedily by walking a trie. Each row starts anew, and
a row of odd length is coded with a zero at its end. Source: QMoE (arXiv 2310.16795), section 4.
Shapes by suffix: N rows, K columns, P = ceil(K / 2) pairs, Q codes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from . import _grid

SIZE, PAIRS = 2**16, 14
ZERO = 0.885
Array = NDArray[Any]


class Dictionary(NamedTuple):
    """``symbols`` uint8 [2**16, 28], ``lengths`` uint8 [2**16] in weights; ``child`` int32 [2**16 + 1, 9]: the code of
    a run and one more pair, or -1; the last row is the empty run.

    ``entries`` uint32 [2**16] say the same in 26 bits, for kernels that visit only weights that are not zero, of which
    a run has at most three: three times 7 bits, place + 32 * symbol, those without a weight (0) first; then the length.
    """

    symbols: Array
    lengths: Array
    child: Array
    entries: Array


@cache
def dictionary() -> Dictionary:
    """The dictionary; codes ascend with length, then in lexicographic order."""
    quota = _quota()
    runs = np.zeros((1, 0), np.uint8)
    parents = np.array([SIZE])
    symbols = np.zeros((SIZE, 2 * PAIRS), np.uint8)
    lengths = np.zeros(SIZE, np.uint8)
    child = np.full((SIZE + 1, 9), -1, np.int32)
    pairs = np.stack(np.divmod(np.arange(9, dtype=np.uint8), 3), axis=1)
    start = 0
    for length in range(1, PAIRS + 1):
        grown = np.concatenate([np.repeat(runs, 9, axis=0), np.tile(pairs, (len(runs), 1))], axis=1)
        origin, pair = np.repeat(parents, 9), np.tile(np.arange(9), len(runs))
        kind = (grown > 0).sum(1)
        keep = np.zeros(len(grown), bool)
        for count in np.unique(kind):
            keep[np.flatnonzero(kind == count)[: quota.get((length, int(count)), 0)]] = True
        runs = grown[keep]
        parents = start + np.arange(len(runs))
        child[origin[keep], pair[keep]] = parents
        symbols[parents, : 2 * length] = runs
        lengths[parents] = 2 * length
        start += len(runs)
    return Dictionary(symbols, lengths, child, _entries(symbols, lengths))


def encode(symbols_NK: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, K] -> codes uint16 [Q] and the first code of every row, then their number: int32 [N + 1]."""
    columns = symbols_NK.shape[1]
    even = pad(symbols_NK.cpu(), (0, columns % 2)).to(torch.uint8).numpy()
    pairs_NP = np.ascontiguousarray(3 * even[:, ::2] + even[:, 1::2])
    compiled = jit()
    codes_NP = (compiled.encode if compiled else _encode)(pairs_NP, dictionary().child)
    used = codes_NP >= 0
    offsets = np.concatenate([[0], used.sum(1).cumsum()]).astype(np.int32)
    return torch.from_numpy(codes_NP[used].astype(np.uint16)), torch.from_numpy(offsets)


def decode(codes_Q: Tensor, rows: int, columns: int) -> Tensor:
    """Symbols uint8 [N, K] of whole rows; on any device."""
    table, lengths = _on(codes_Q.device)
    found = codes_Q.to(torch.int32)
    valid = torch.arange(2 * PAIRS, device=found.device) < lengths[found][:, None]
    return table[found][valid].view(rows, -1)[:, :columns]


def unpack(codes_Q: Tensor, offsets: Tensor, columns: int) -> Tensor | None:
    """Symbols of two bits each, uint8 [N, K / 4], low bits first; None where the codes do not add up to rows.

    K must be a multiple of 4; in main memory.
    """
    rows = len(offsets) - 1
    compiled = jit()
    if compiled is None:
        whole = sound(codes_Q, offsets, columns)
        return _grid.pack(decode(codes_Q, rows, columns), 2) if whole else None
    out = torch.empty(rows, columns // 4, dtype=torch.uint8)
    whole = compiled.unpack(codes_Q.numpy(), offsets.numpy(), words(), out.numpy())
    return out if whole else None


@cache
def words() -> Array:
    """uint64 [2**16]: the symbols of a run, two bits each, above six bits that say how many bits those are."""
    made = dictionary()
    symbols = made.symbols.astype(np.uint64) << np.arange(6, 62, 2, dtype=np.uint64)
    return np.asarray(np.bitwise_or.reduce(symbols, axis=1) | (2 * made.lengths.astype(np.uint64)))


def sound(codes_Q: Tensor, offsets: Tensor, columns: int) -> bool:
    """Whether the codes of every row add up to its columns: what kernels rely on when they read a file's codes."""
    codes, ends = codes_Q.cpu().numpy(), offsets.cpu().numpy()
    if ends[0] != 0 or ends[-1] != len(codes) or (np.diff(ends) < (columns > 0)).any():
        return False
    table = dictionary()
    lengths = table.lengths[codes].astype(np.int64)
    total = np.concatenate([[0], lengths.cumsum()])
    if (np.diff(total[ends]) != columns + columns % 2).any():
        return False
    last = ends[1:] - 1
    return columns % 2 == 0 or not table.symbols[codes[last], lengths[last] - 1].any()


def zeros(codes_Q: Tensor, rows: int, columns: int) -> int:
    """How many weights are zero."""
    counts = (dictionary().symbols > 0).sum(1)
    return rows * columns - int(counts[codes_Q.cpu().numpy()].sum())


@cache
def jit() -> Any:
    """The compiled functions, or None where Numba is not installed."""
    return importlib.import_module("moekit.formats._code_jit") if importlib.util.find_spec("numba") else None


@cache
def _on(device: torch.device) -> tuple[Tensor, Tensor]:
    made = dictionary()
    return torch.from_numpy(made.symbols).to(device), torch.from_numpy(made.lengths).to(device)


def _entries(symbols: Array, lengths: Array) -> Array:
    code, place = np.nonzero(symbols)
    counts = np.bincount(code, minlength=SIZE)
    assert counts.max() == 3
    slot = 3 - np.repeat(counts, counts) + np.arange(len(code)) - np.repeat(counts.cumsum() - counts, counts)
    fields = np.zeros((SIZE, 3), np.uint32)
    fields[code, slot] = place + 32 * symbols[code, place].astype(np.uint32)
    packed: Array = (fields << np.array([0, 7, 14], np.uint32)).sum(1, dtype=np.uint32)
    return packed | (lengths.astype(np.uint32) << 21)


def _quota() -> dict[tuple[int, int], int]:
    """How many runs of so many (pairs, nonzero weights) belong to the dictionary."""
    zero, level = math.log(ZERO), math.log((1 - ZERO) / 2)
    kinds = [(length, count) for length in range(1, PAIRS + 1) for count in range(2 * length + 1)]
    kinds.sort(key=lambda kind: -((2 * kind[0] - kind[1]) * zero + kind[1] * level))
    quota, left = {}, SIZE
    for length, count in kinds:
        quota[length, count] = min(left, math.comb(2 * length, count) * 2**count)
        left -= quota[length, count]
    return quota


def _encode(pairs_NP: Array, child: Array) -> Array:
    """Codes [N, P + 1] where a run ends before this pair, else -1; all rows step together."""
    rows, pairs = pairs_NP.shape
    ended = np.full((rows, pairs + 1), -1, np.int32)
    state = np.full(rows, SIZE, np.int32)
    for p in range(pairs):
        pair = pairs_NP[:, p]
        longer = child[state, pair]
        stop = longer < 0
        ended[stop, p] = state[stop]
        state = np.where(stop, child[SIZE, pair], longer)
    if pairs:
        ended[:, pairs] = state
    return ended
