"""Walking the trie of the dictionary code, compiled by Numba where it is installed."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
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
