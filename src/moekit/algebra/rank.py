"""Choosing the best of a layer's experts by a score, deterministically, with groups kept even.

Shapes by suffix: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np


def share_to_count(share: float | int, total: int) -> int:
    """How many of ``total`` a share (a float) or a number (an int) means; a share rounds up."""
    return share if isinstance(share, int) else math.ceil(share * total - 1e-9)


def best(score_E: np.ndarray, count: int, *, protected: Collection[int] = (), num_groups: int = 1) -> tuple[int, ...]:
    """The ``count`` experts of highest score, ascending. Ties go to the lower id; NaN ranks below everything.

    ``protected`` experts come first, whatever their score. With groups (equal runs of ids) every group gives the same
    number, ``count`` rounded up to a multiple of ``num_groups``.
    """
    score_E = np.asarray(score_E, dtype=float).copy()
    score_E[np.isnan(score_E)] = -np.inf
    guarded = np.isin(np.arange(len(score_E)), list(protected))
    size, each = len(score_E) // num_groups, -(-count // num_groups)
    chosen: list[int] = []
    for start in range(0, len(score_E), size):
        ids = np.arange(start, start + size)
        order = np.lexsort((ids, -score_E[ids], ~guarded[ids]))
        chosen += ids[order[:each]].tolist()
    return tuple(sorted(chosen))
