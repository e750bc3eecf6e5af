"""The loops of fused expert kernels, compiled by Numba: a function runs its share of a :data:`JOB` on one thread.

A function takes the address of a JOB; threads draw tasks from its counter until there are none. Functions are compiled
when first asked for, one per kind of weights (see :mod:`moekit.kernels._simd`), and kept on disk.
Shapes by suffix: T tokens, K slots, S pairs sorted by expert, E experts, H hidden size, N and K of a weight matrix.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from ..formats.numba_cache import KEEPS
from . import _codes, _inner, _inner_codes, _inner_int8, _inner_rows, _simd, _tables
from ._codes import rounds as rounds
from ._inner import (
    GRID_BYTES,
    dot,
    made_from,
    panel,
    take,
    transpose,
    word,
)
from ._inner_codes import panel_codes, turn_codes
from ._inner_int8 import panel_int8
from ._inner_rows import silu_mul
from ._simd import LANES


def record(*names: str) -> np.dtype:
    return np.dtype([(name, np.int64) for name in names])


JOB = record(
    "counter", "here", "tasks", "table", "experts", "x", "width", "out", "columns", "half", "hidden", "scales", "codes"
)
"""``here``: its own address; ``table``: address of tasks [.., 5] (expert, first row, end, first column, end);
``experts``: address of [E, 8], the FIELDS of :mod:`moekit.kernels.fused`; ``x`` [S, width] and ``out`` [S, columns]
float32. Where ``half`` is not 0, the columns of a task are done in both halves of ``out``; where ``hidden`` is not 0
either, silu(first half) * second half goes there, [S, half]. With int8 weights x is bytes, times
``scales`` [S]; ``codes`` are the rows of x for kinds of weights that want 16 bits (:mod:`moekit.kernels._codes`).
"""

PANEL = 32
"""Columns of ``out`` that are computed together."""

TURNED_FROM = 49
"""Rows of an expert from which weights that lie row after row are first transposed into panels."""

CODED_FROM = 4
"""The same where x is rounded to 16 bits: panels of bytes are a fourth of the work to make, and twice as fast."""

code_size = njit(_codes.code_size)

_JOB = types.void(types.CPointer(from_dtype(JOB)))


SOURCES = hashlib.sha256(
    b"".join(
        Path(m.__file__ or "").read_bytes()
        for m in (_simd, _codes, _tables, _inner, _inner_codes, _inner_int8, _inner_rows)
    )
).hexdigest()
"""Numba looks for changes in this file only; what it is told of the others makes it compile anew when they change."""

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
    at = job.experts + 64 * e
    return word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 4), word(at, 5), word(at, 6), word(at, 7)


@njit
def _activate(job, first, end, column):
    if job.hidden:
        for row in range(first, end):
            gate = job.out + 4 * (row * job.columns + column)
            silu_mul(gate, gate + 4 * job.half, job.hidden + 4 * (row * job.half + column), PANEL)


@built
def by_rows(kind: str, sources: str = SOURCES):
    """Products with weights [N, K] as they lie, row after row."""
    in_codes = rounds(kind)

    @cfunc(_JOB, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, stride, scales, mins, groups, shift, bias, planes = _expert(job, e)
            turn, width, columns = end - first >= (CODED_FROM if in_codes else TURNED_FROM), job.width, job.columns
            buffer = np.empty(PANEL * width if turn else 1, np.float32)
            scratch, turned = np.empty(LANES * GRID_BYTES * groups, np.uint8), buffer.ctypes.data
            x, codes, count = job.x + 4 * first * width, job.codes + first * code_size(width), end - first
            for column in range(left, right, PANEL):
                for n in range(column, 2 * job.half if job.half else column + 1, job.half if job.half else 1):
                    out, grid, add = job.out + 4 * (first * columns + n), n * groups, bias + 4 * n
                    matrix = (weight + n * stride, stride, scales + grid, mins + grid, groups, shift, planes, n)
                    if turn and in_codes:
                        turn_codes(kind, matrix, width, turned)
                        panel_codes(turned, codes, count, width, add, out, columns)
                    elif turn:
                        transpose(kind, matrix, scratch.ctypes.data, width, turned)
                        panel("float32", 0, turned, 4 * PANEL, 4096, x, width, count, width, add, out, columns)
                    else:
                        dot(kind, matrix, scratch.ctypes.data, x, codes, count, width, add, out, columns)
                _activate(job, first, end, column)
            task = take(job.here)

    return run


@built
def by_panels(kind: str, sources: str = SOURCES):
    """Products with panels of weights [K, 32]: ``stride`` bytes between rows of a panel, ``groups`` between panels."""

    @cfunc(_JOB, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, stride, _, _, groups, _, bias, _ = _expert(job, e)
            x, count = job.x + 4 * first * job.width, end - first
            for column in range(left, right, PANEL):
                for n in range(column, 2 * job.half if job.half else column + 1, job.half if job.half else 1):
                    w, out = weight + n // PANEL * groups, job.out + 4 * (first * job.columns + n)
                    panel(kind, 0, w, stride, 4096, x, job.width, count, job.width, bias + 4 * n, out, job.columns)
                _activate(job, first, end, column)
            task = take(job.here)

    return run


@built
def by_columns(kind: str, sources: str = SOURCES):
    """Products x @ W with weights [K, N] as they lie, a few rows at a time; ``out`` is zero before."""

    @cfunc(_JOB, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, stride, _, _, size, _, bias, _ = _expert(job, e)
            for k in range(0, job.width, PANEL):
                x = job.x + 4 * (first * job.width + k)
                for n in range(left, right, PANEL):
                    w, out = weight + k * stride + n * size, job.out + 4 * (first * job.columns + n)
                    panel(kind, 1, w, stride, 512, x, job.width, end - first, PANEL, bias, out, job.columns)
            task = take(job.here)

    return run


@built
def by_int8(sources: str = SOURCES):
    """Products with int8 weights in panels [N / 32, K / 4, 32, 4] and x rounded to bytes."""

    @cfunc(_JOB, cache=KEEPS)
    def run(pointer):
        made_from(sources)
        job = carray(pointer, 1)[0]
        task = take(job.here)
        while task < job.tasks:
            e, first, end, left, right = _task(job, task)
            weight, _, scales, offsets, _, _, bias, _ = _expert(job, e)
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
