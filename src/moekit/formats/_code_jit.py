"""Walking the trie of the dictionary code, and back, compiled by Numba where it is installed."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from .numba_cache import KEEPS


@njit(nogil=True, cache=KEEPS)
def encode(pairs_NP, child):
    """Codes [N, P + 1] where a run ends before this pair, else -1."""
    rows, pairs = pairs_NP.shape
    root = child.shape[0] - 1
    ended = np.full((rows, pairs + 1), -1, np.int32)
    for n in range(rows):
        state = root
        for p in range(pairs):
            longer = child[state, pairs_NP[n, p]]
            if longer < 0:
                ended[n, p] = state
                state = child[root, pairs_NP[n, p]]
            else:
                state = longer
        if pairs:
            ended[n, pairs] = state
    return ended


@njit(nogil=True, cache=KEEPS)
def unpack(codes, offsets, words, out_NB):
    """Two bits a weight, low bits first; false, with nothing to rely on, where codes do not add up to rows.

    ``words`` are of :func:`~moekit.formats._code.words`. A row has an even number of columns, ``out_NB`` a byte for
    every four.
    """
    rows, size = out_NB.shape
    if offsets[0] != 0 or offsets[rows] != len(codes):
        return False
    for n in range(rows):
        at, rest, bits, left = 0, np.uint64(0), np.uint64(0), 8 * size
        for q in range(offsets[n], offsets[n + 1]):
            if q < 0 or q >= len(codes):
                return False
            word = words[codes[q]]
            left -= np.int64(word & np.uint64(63))
            if left < 0:
                return False
            rest |= (word >> np.uint64(6)) << bits
            bits += word & np.uint64(63)
            while bits >= 8:
                out_NB[n, at] = rest & np.uint64(255)
                at += 1
                rest >>= np.uint64(8)
                bits -= np.uint64(8)
        if left:
            return False
    return True
