"""The loops of fused expert kernels, compiled by Numba: a function runs its share of a :data:`JOB` on one thread.

A function takes the address of a JOB; threads draw tasks from its counter until there are none. Functions are compiled
when first asked for, one per kind of weights (see :mod:`moekit.kernels._simd`), and kept on disk.
Shapes by suffix: T tokens, K slots, S pairs sorted by expert, E experts, H hidden size, N and K of a weight matrix.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from ._inner import axpy, dot, floats, panel, panel_int8, quantise, silu_mul, take, transpose, word


def _record(*names: str) -> np.dtype:
    return np.dtype([(name, np.int64) for name in names])


JOB = _record(
    "counter", "here", "tasks", "table", "experts", "x", "width", "out", "columns", "half", "hidden", "scales"
)
"""``here``: its own address; ``table``: address of tasks [.., 5] (expert, first row, end, first column, end);
``experts``: address of [E, 7], the FIELDS of :mod:`moekit.kernels.fused`; ``x`` [S, width] and ``out`` [S, columns]
float32. Where ``half`` is not 0, the columns of a task are done in both halves of ``out``; where ``hidden`` is not 0
either, silu(first half) * second half goes there, [S, half]. With int8 weights x is bytes, times ``scales`` [S].
"""

PANEL = 32
"""Columns of ``out`` that are computed together."""

TURNED_FROM = 48
"""Rows of an expert from which weights that lie row after row are first transposed into panels."""

MOVE = _record("counter", "here", "tasks", "pairs", "rows", "slots", "x", "y", "weights", "width")
"""Rows between tokens ``x`` [T, width] and sorted pairs ``y`` [rows, width], float32; ``pairs``: address of ``rows``
places in the flat routing [T * slots]; ``weights`` [T * slots] float32."""

STRIP = 128
"""Columns that a task of a MOVE takes."""

ROUNDED = 8
"""Rows that a task rounds."""

ROWS = 192
"""Rows of an expert that one task takes at most."""

_JOB, _MOVE = (types.void(types.CPointer(from_dtype(record))) for record in (JOB, MOVE))


SECONDS: dict[str, float] = {}
"""How long each function of this module took to compile or to load from disk."""


def built(make: Callable[..., Any]) -> Callable[..., Any]:
    """Compile once, when first asked for."""

    @cache
    @wraps(make)
    def once(*kind: str) -> Any:
        start = time.perf_counter()
        function = make(*kind)
        SECONDS[" ".join((make.__name__, *kind))] = time.perf_counter() - start
        return function

    return once


@njit
def _task(job, task):
    at = job.table + 40 * task
    return word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 4)


@njit
def _expert(job, e):
    at = job.experts + 56 * e
    return word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 4), word(at, 5), word(at, 6)


@njit
def _activate(job, first, end, column):
    if job.hidden:
        for row in range(first, end):
            gate = job.out + 4 * (row * job.columns + column)
            silu_mul(gate, gate + 4 * job.half, job.hidden + 4 * (row * job.half + column), PANEL)


@built
def by_rows(kind: str):
    """Products with weights [N, K] as they lie, row after row."""

    @cfunc(_JOB, cache=True)
    def run(pointer):
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, stride, scales, mins, groups, shift, bias = _expert(job, e)
            turn = end - first >= TURNED_FROM
            buffer = np.empty(PANEL * job.width if turn else 1, np.float32)
            turned = buffer.ctypes.data
            x, count = job.x + 4 * first * job.width, end - first
            for column in range(left, right, PANEL):
                for n in range(column, 2 * job.half if job.half else column + 1, job.half if job.half else 1):
                    out = job.out + 4 * (first * job.columns + n)
                    if turn:
                        w, c = weight + n * stride, n * groups
                        transpose(kind, w, stride, scales + c, mins + c, groups, shift, job.width, turned)
                        panel("float32", turned, 4 * PANEL, x, count, job.width, bias + 4 * n, out, job.columns)
                    else:
                        for r in range(n, n + PANEL, 4):
                            w, c, o = weight + r * stride, r * groups, out + 4 * (r - n)
                            dot(
                                kind,
                                w,
                                stride,
                                scales + c,
                                mins + c,
                                groups,
                                shift,
                                x,
                                count,
                                job.width,
                                bias + 4 * r,
                                o,
                                job.columns,
                            )
                _activate(job, first, end, column)
            task = take(job.here)

    return run


@built
def by_panels(kind: str):
    """Products with weights laid out in panels [N / 32, K, 32]; ``stride`` is bytes of 32 weights."""

    @cfunc(_JOB, cache=True)
    def run(pointer):
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, stride, _, _, _, _, bias = _expert(job, e)
            x, count = job.x + 4 * first * job.width, end - first
            for column in range(left, right, PANEL):
                for n in range(column, 2 * job.half if job.half else column + 1, job.half if job.half else 1):
                    w, out = weight + n // PANEL * job.width * stride, job.out + 4 * (first * job.columns + n)
                    panel(kind, w, stride, x, count, job.width, bias + 4 * n, out, job.columns)
                _activate(job, first, end, column)
            task = take(job.here)

    return run


@built
def by_int8():
    """Products with int8 weights in panels [N / 32, K / 4, 32, 4] and x rounded to bytes."""

    @cfunc(_JOB, cache=True)
    def run(pointer):
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, _, scales, offsets, _, _, bias = _expert(job, e)
            x, count = job.x + first * job.width, end - first
            for column in range(left, right, PANEL):
                for n in range(column, 2 * job.half if job.half else column + 1, job.half if job.half else 1):
                    out, at = job.out + 4 * (first * job.columns + n), 4 * n
                    panel_int8(
                        weight + n * job.width,
                        scales + at,
                        offsets + at,
                        x,
                        job.scales + 4 * first,
                        count,
                        job.width,
                        bias + at,
                        out,
                        job.columns,
                    )
                _activate(job, first, end, column)
            task = take(job.here)

    return run


@built
def rounded():
    """Rows of x to bytes y [rows, width] and their scales (``weights``); ``pairs`` is 0 where row i is x[i]."""

    @cfunc(_MOVE, cache=True)
    def run(pointer):
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            for row in range(task * ROUNDED, min(task * ROUNDED + ROUNDED, job.rows)):
                token = word(job.pairs, row) // job.slots if job.pairs else row
                quantise(job.x + 4 * token * job.width, job.y + row * job.width, job.weights + 4 * row, job.width)
            task = take(job.here)

    return run


@built
def gather():
    """y[row] = x[token of the row], a strip of columns per task."""

    @cfunc(_MOVE, cache=True)
    def run(pointer):
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            left = task * STRIP
            size = min(STRIP, job.width - left)
            for row in range(job.rows):
                token = word(job.pairs, row) // job.slots
                source = carray(floats(job.x + 4 * (token * job.width + left)), size)
                target = carray(floats(job.y + 4 * (row * job.width + left)), size)
                target[:] = source
            task = take(job.here)

    return run


@built
def combine():
    """x[token of the row] += weight * y[row], row after row, a strip of columns per task."""

    @cfunc(_MOVE, cache=True)
    def run(pointer):
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


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def share(start_E, kind_E, kind, low, high, columns, threads, table):
    """Tasks [.., 5] of the experts of one kind for rows ``low`` to ``high``; returns how many.

    Rows are counted from ``low``. Experts are cut by columns until there are several tasks for every thread, and by
    rows where they would not stay in the second-level cache.
    """
    pieces = 0
    for e in range(len(kind_E)):
        size = min(high, start_E[e + 1]) - max(low, start_E[e])
        if kind_E[e] == kind and size > 0:
            pieces += -(-size // ROWS)
    if pieces == 0:
        return 0
    parts = min(-(-8 * threads // pieces) if threads > 1 else 1, columns // PANEL)
    wide = -(-(columns // PANEL) // parts) * PANEL
    count = 0
    for e in range(len(kind_E)):
        first, end = max(low, start_E[e]), min(high, start_E[e + 1])
        if kind_E[e] != kind or first >= end:
            continue
        cuts = -(-(end - first) // ROWS)
        for left in range(0, columns, wide):
            for cut in range(cuts):
                table[count, 0] = e
                table[count, 1] = first - low + (end - first) * cut // cuts
                table[count, 2] = first - low + (end - first) * (cut + 1) // cuts
                table[count, 3], table[count, 4] = left, min(left + wide, columns)
                count += 1
    return count
