"""What comes before and after the products of fused kernels, compiled by Numba: sorting, sharing out, moving rows.

Shapes by suffix: T tokens, K slots, S pairs sorted by expert, E experts.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import carray, cfunc, from_dtype, njit, types

from ..formats.numba_cache import KEEPS
from ._compiled import PANEL, SOURCES, built, code_size, record
from ._inner import floats, made_from, take, word
from ._inner_int8 import round_bytes, round_words
from ._inner_rows import axpy, copy

MOVE = record("counter", "here", "tasks", "pairs", "rows", "slots", "x", "y", "weights", "width")
"""Rows between tokens ``x`` [T, width] and sorted pairs ``y`` [rows, width], float32; ``pairs``: address of ``rows``
places in the flat routing [T * slots]; ``weights`` [T * slots] float32."""

STRIP = 128
"""Columns that a task of a MOVE takes."""

ROUNDED = 8
"""Rows that a task rounds."""

ROWS = 192
"""Rows of an expert that one task takes at most: they stay in the second-level cache."""

_MOVE = types.void(types.CPointer(from_dtype(MOVE)))


@built
def rounded(bits: str, sources: str = SOURCES):
    """Rows of x to y [rows, ..] as integers of "8" or "16" bits; ``pairs`` is 0 where row i is x[i].

    With 8 bits the scales go to ``weights``; 16 bits hold their own.
    """
    words = bits == "16"

    @cfunc(_MOVE, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            for row in range(task * ROUNDED, min(task * ROUNDED + ROUNDED, job.rows)):
                token = word(job.pairs, row) // job.slots if job.pairs else row
                x = job.x + 4 * token * job.width
                if words:
                    round_words(x, job.y + row * code_size(job.width), job.width)
                else:
                    round_bytes(x, job.y + row * job.width, job.weights + 4 * row, job.width)
            task = take(job.here)

    return run


@built
def gather(sources: str = SOURCES):
    """y[row] = x[token of the row], a strip of columns per task."""

    @cfunc(_MOVE, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            left = task * STRIP
            size = min(STRIP, job.width - left)
            for row in range(job.rows):
                token = word(job.pairs, row) // job.slots
                copy(job.x + 4 * (token * job.width + left), job.y + 4 * (row * job.width + left), size)
            task = take(job.here)

    return run


@built
def combine(sources: str = SOURCES):
    """x[token of the row] += weight * y[row], row after row, a strip of columns per task."""

    @cfunc(_MOVE, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            left = task * STRIP
            size = min(STRIP, job.width - left)
            for row in range(job.rows):
                pair = word(job.pairs, row)
                weight = carray(floats(job.weights + 4 * pair), 1)[0]
                target = job.x + 4 * (pair // job.slots * job.width + left)
                axpy(weight, job.y + 4 * (row * job.width + left), target, size)
            task = take(job.here)

    return run


@njit(cache=KEEPS, nogil=True)
def sort(index_S, experts, pair_S, start_E):
    """Counting sort of the flat routing: places by expert, in order; ids outside 0..E-1 are left out.

    ``start_E`` [E + 1] is where each expert's pairs begin.
    """
    start_E[:] = 0
    for e in index_S:
        if 0 <= e < experts:
            start_E[e + 1] += 1
    for e in range(experts):
        start_E[e + 1] += start_E[e]
    filled = start_E.copy()
    for place in range(len(index_S)):
        e = index_S[place]
        if 0 <= e < experts:
            pair_S[filled[e]] = place
            filled[e] += 1


@njit(cache=KEEPS, nogil=True)
def share(start_E, kind_E, kind, low, high, columns, threads, most, table):
    """Tasks [.., 5] of the experts of one kind for rows ``low`` to ``high``; returns how many.

    Rows are counted from ``low``. Experts are cut by columns until there are several tasks for every thread, and into
    at most ``most`` rows.
    """
    pieces = 0
    for e in range(len(kind_E)):
        size = min(high, start_E[e + 1]) - max(low, start_E[e])
        if kind_E[e] == kind and size > 0:
            pieces += -(-size // most)
    if pieces == 0:
        return 0
    parts = min(-(-8 * threads // pieces) if threads > 1 else 1, columns // PANEL)
    wide = -(-(columns // PANEL) // parts) * PANEL
    count = 0
    for e in range(len(kind_E)):
        first, end = max(low, start_E[e]), min(high, start_E[e + 1])
        if kind_E[e] != kind or first >= end:
            continue
        cuts = -(-(end - first) // most)
        for left in range(0, columns, wide):
            for cut in range(cuts):
                table[count, 0] = e
                table[count, 1] = first - low + (end - first) * cut // cuts
                table[count, 2] = first - low + (end - first) * (cut + 1) // cuts
                table[count, 3], table[count, 4] = left, min(left + wide, columns)
                count += 1
    return count
