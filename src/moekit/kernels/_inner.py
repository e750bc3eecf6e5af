"""The inner loops of expert products as Numba intrinsics.

Numba cannot say which values stay in registers; these can. All take addresses as integers; a kind of weights must be a
literal, as it chooses the code that is emitted (:mod:`moekit.kernels._simd`). float32 unless said otherwise.
Shapes by suffix: M rows of x, N rows and K columns of a weight matrix.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._codes import code_at, code_bytes, dot_code, integers_at, rounds
from ._simd import (
    BITS,
    COLUMNS,
    F32,
    I64,
    LANES,
    VECTOR,
    Sums,
    blocks,
    chunk,
    const,
    grid_at,
    load,
    loop,
    prefetch,
    row,
    splat,
    store,
    total,
    turned,
)
from ._tables import READY


@intrinsic(prefer_literal=True)
def made_from(context, sources):
    """Nothing: it keeps what a function was compiled from among its constants, by which Numba finds it on disk."""

    def emit(context, b, signature, arguments):
        return context.get_dummy_value()

    return types.void(sources), emit


@intrinsic
def take(context, address):
    """Adds one to the int64 at ``address`` and returns what it was: threads share out tasks with it."""

    def emit(context, b, signature, arguments):
        return b.atomic_rmw("add", b.inttoptr(arguments[0], I64.as_pointer()), const(1), "monotonic")

    return types.int64(types.int64), emit


@intrinsic
def word(context, address, index):
    """The int64 number ``index`` behind an address."""

    def emit(context, b, signature, arguments):
        return load(b, I64, b.add(arguments[0], b.shl(arguments[1], const(3))), 0, 8)

    return types.int64(types.int64, types.int64), emit


def _pointer(kind):
    @intrinsic
    def pointer(context, address):
        def emit(context, b, signature, arguments):
            return b.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), emit

    return pointer


floats, bytes_at = _pointer(types.float32), _pointer(types.uint8)
"""An address as the pointer that ``numba.carray`` takes."""


GRID_BYTES = 18
"""Room for a row's grids in float32, for each byte of one of them as stored: two and at most seven planes."""

MATRIX = types.UniTuple(types.int64, 8)


@intrinsic(prefer_literal=True)
def dot(context, kind, matrix, scratch, x, codes, count, width, bias, out, out_width):
    """out[m, r] = bias[r] + W[r] . x[m] for 32 rows of W and ``count`` rows of x, ``width`` long.

    ``matrix``: address of W, bytes of its rows, addresses of scales and mins, bytes of their rows, logarithm of the
    group size, address of planes, number of the first row; ``out_width`` is in float32. ``codes``: the rows of x as
    :func:`round_words` leaves them, for kinds that :func:`rounds`; ``scratch``: room for kinds that are :data:`READY`.
    W is read where it lies, and what comes next is fetched ahead.
    """
    name = kind.literal_value
    signature, coded = types.void(kind, MATRIX, *(types.int64,) * 8), rounds(name)

    def emit(context, b, signature, arguments):
        scratch, x, codes, count, width, bias, out, out_width = arguments[2:]
        stride = cgutils.unpack_tuple(b, arguments[1])[1]
        x_rows = (codes, code_bytes(b, width)) if coded else (x, b.shl(width, const(2)))
        rows, sizes = (2, (8, 4, 3, 2, 1)) if name in READY else (4, (6, 4, 3, 2, 1))
        with loop(b, const(32), rows) as first:
            lines = lines_of(b, name, arguments[1], first, rows, scratch)
            at = b.shl(first, const(2))
            out_rows = (b.add(out, at), b.shl(out_width, const(2)))
            for M, x_at, out_at in blocks(b, sizes, count, x_rows, out_rows):
                values = _dot_block(b, name, lines, stride, width, [x_at(m) for m in range(M)])
                for m, of_rows in enumerate(values):
                    for r, value in enumerate(of_rows):
                        store(b, b.fadd(value, load(b, F32, b.add(bias, at), 4 * r)), out_at(m), 4 * r)
        return context.get_dummy_value()

    return signature, emit


def _dot_block(b, name, lines, stride, width, x_rows) -> list:
    """W[r] . x[m] of every m and r."""
    step = chunk(name)
    if name in READY and len(x_rows) <= 2:  # one row at a time, a sum for each part of a chunk: none waits for another
        return list(zip(*(_one_line(b, name, line, stride, width, x_rows) for line in lines), strict=True))
    sums = Sums(b, len(x_rows), len(lines))
    with loop(b, width, step) as k:
        if name not in READY:
            fetch(b, name, lines, b.shl(stride, const(3)), k)
        _dot_step(b, name, lines, k, x_rows, sums)
    totals = [[total(b, sums.get(m, r)) for r in range(len(lines))] for m in range(len(x_rows))]
    if rounds(name):
        scales = [load(b, F32, x) for x in x_rows]
        totals = [[b.fmul(value, scale) for value in row] for row, scale in zip(totals, scales, strict=True)]
    return totals


def _one_line(b, name, line, stride, width, x_rows) -> list:
    """One row of W."""
    parts = chunk(name) // LANES
    sums = Sums(b, len(x_rows), parts)
    with loop(b, width, chunk(name)) as k:
        for v, value in enumerate(COLUMNS[name](b, line[0], k, line[1])):
            for m, row in enumerate(x_rows):
                sums.add(m, v, value, load(b, VECTOR, b.add(row, b.shl(k, const(2))), 64 * v))
    found = []
    for m in range(len(x_rows)):
        whole = sums.get(m, 0)
        for v in range(1, parts):
            whole = b.fadd(whole, sums.get(m, v))
        found.append(total(b, whole))
    return found


def fetch(b, name, lines, distance, k) -> None:
    """What will be read ``distance`` bytes on."""
    ahead = b.add(b.lshr(b.mul(k, const(BITS[name])), const(3)), distance)
    for line, _ in lines:
        for offset in range(0, chunk(name) * BITS[name] // 8, 64):
            prefetch(b, b.add(b.add(line, ahead), const(offset)))


def lines_of(b, name, matrix, first, count: int, scratch=None) -> list:
    """(address of a row of W, its grid) of ``count`` rows from ``first`` on."""
    fields = cgutils.unpack_tuple(b, matrix)
    if name not in READY:
        return [row(b, fields, b.add(first, const(r))) for r in range(count)]
    begin, line = READY[name]

    def room(r):
        return b.add(scratch, b.mul(b.mul(fields[4], const(GRID_BYTES)), r))

    with loop(b, const(count), 1) as r:
        begin(b, fields, b.add(first, r), room(r))
    return [line(b, fields, b.add(first, const(r)), room(const(r))) for r in range(count)]


def _dot_step(b, name, lines, k, x_rows, sums) -> None:
    """One chunk of columns from ``k`` on."""
    if rounds(name):
        places = [code_at(b, row, k) for row in x_rows]
        for r, (line, grid) in enumerate(lines):
            integers, (scale, low) = integers_at(b, name, line, k), grid_at(b, k, grid)
            for m, place in enumerate(places):
                sums.put(m, r, dot_code(b, place, integers, scale, low, sums.get(m, r)))
        return
    if name in READY:  # decoded row by row: all rows at once would not leave registers for the sums
        for r, (line, grid) in enumerate(lines):
            for v, value in enumerate(COLUMNS[name](b, line, k, grid)):
                for m, row in enumerate(x_rows):
                    sums.add(m, r, value, load(b, VECTOR, b.add(row, b.shl(k, const(2))), 64 * v))
        return
    values = [COLUMNS[name](b, line, k, grid) for line, grid in lines]
    for v in range(chunk(name) // LANES):
        for m, row in enumerate(x_rows):
            part = load(b, VECTOR, b.add(row, b.shl(k, const(2))), 64 * v)
            for r in range(4):
                sums.add(m, r, values[r][v], part)


PANEL_ROWS = (12, 8, 6, 4, 3, 2, 1)


@intrinsic(prefer_literal=True)
def panel(context, kind, adds, weight, stride, ahead, x, x_width, count, width, bias, out, out_width):
    """out[m, :32] = bias[:32] + sum over k of x[m, k] * W[k, :32], for ``count`` rows of x, ``width`` long.

    ``stride`` is bytes between W[k] and W[k + 1], ``ahead`` from a weight to the one that is fetched when it is used;
    x and ``out`` are float32. ``width`` is a multiple of 4 unless ``count`` is one of 32. Where ``adds`` is 1, ``out``
    itself is added instead of the bias.
    """
    name, signature = kind.literal_value, types.void(kind, adds, *(types.int64,) * 10)

    def emit(context, b, signature, arguments):
        weight, stride, ahead, x, x_width, count, width, bias, out, out_width = arguments[2:]
        start = [load(b, VECTOR, bias, 64 * v) for v in range(2)]
        rows = (x, b.shl(x_width, const(2))), (out, b.shl(out_width, const(2)))
        for M, x_at, out_at in blocks(b, PANEL_ROWS, count, *rows):
            unroll = 4 if M <= 3 else 2 if M <= 6 else 1  # each with sums of its own, as far as registers go
            sums = Sums(b, M, 2 * unroll)
            with loop(b, width, unroll) as first:
                for u in range(unroll):
                    k = b.add(first, const(u))
                    line = b.add(weight, b.mul(k, stride))
                    for offset in range(0, 4 * BITS[name], 64):
                        prefetch(b, b.add(b.add(line, ahead), const(offset)))
                    values = COLUMNS[name](b, line, const(0), None)
                    for m in range(M):
                        one = splat(b, load(b, F32, b.add(x_at(m), b.shl(k, const(2))), 0, 4))
                        for v in range(2):
                            sums.add(m, 2 * u + v, one, values[v])
            for m in range(M):
                for v in range(2):
                    value = load(b, VECTOR, out_at(m), 64 * v) if adds.literal_value else start[v]
                    for u in range(unroll):
                        value = b.fadd(value, sums.get(m, 2 * u + v))
                    store(b, value, out_at(m), 64 * v)
        return context.get_dummy_value()

    return signature, emit


@intrinsic(prefer_literal=True)
def transpose(context, kind, matrix, scratch, width, out):
    """out[k, :32] = W[:32, k] as float32, for k < ``width``: rows of any kind to a panel."""
    name = kind.literal_value
    step = chunk(name)
    signature = types.void(kind, MATRIX, *(types.int64,) * 3)

    def emit(context, b, signature, arguments):
        matrix, scratch, width, out = arguments[1:]
        with loop(b, const(2 * LANES), LANES) as first:
            lines, side = lines_of(b, name, matrix, first, LANES, scratch), b.add(out, b.shl(first, const(2)))
            with loop(b, width, step) as k:
                values = [COLUMNS[name](b, line, k, grid) for line, grid in lines]
                for v in range(step // LANES):
                    for column, value in enumerate(turned(b, [each[v] for each in values])):
                        store(b, value, b.add(side, b.mul(k, const(128))), 128 * (LANES * v + column))
        return context.get_dummy_value()

    return signature, emit
