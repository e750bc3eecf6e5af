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
    exp,
    fma,
    grid_at,
    load,
    loop,
    prefetch,
    same,
    splat,
    store,
    total,
    turned,
)


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


MATRIX = types.UniTuple(types.int64, 6)


@intrinsic(prefer_literal=True)
def dot(context, kind, matrix, x, codes, count, width, bias, out, out_width):
    """out[m, r] = bias[r] + W[r] . x[m] for 32 rows of W and ``count`` rows of x, ``width`` long.

    ``matrix``: address of W, bytes of its rows, addresses of scales and mins, bytes of their rows, logarithm of the
    group size; ``out_width`` is in float32. ``codes``: the rows of x as :func:`round_words` leaves them, for kinds
    that :func:`rounds`. W is read where it lies, and what comes next is fetched ahead.
    """
    name = kind.literal_value
    step, signature, coded = chunk(name), types.void(kind, MATRIX, *(types.int64,) * 7), rounds(name)

    def emit(context, b, signature, arguments):
        x, codes, count, width, bias, out, out_width = arguments[2:]
        stride = cgutils.unpack_tuple(b, arguments[1])[1]
        x_rows = (codes, code_bytes(b, width)) if coded else (x, b.shl(width, const(2)))
        with loop(b, const(32), 4) as first:
            lines = list(_lines(b, arguments[1], first, 4))
            at = b.shl(first, const(2))
            out_rows = (b.add(out, at), b.shl(out_width, const(2)))
            for M, x_at, out_at in blocks(b, (6, 4, 3, 2, 1), count, x_rows, out_rows):
                sums = Sums(b, M, 4)
                with loop(b, width, step) as k:
                    ahead = b.add(b.lshr(b.mul(k, const(BITS[name])), const(3)), b.mul(stride, const(8)))
                    for line, _ in lines:
                        for offset in range(0, step * BITS[name] // 8, 64):
                            prefetch(b, b.add(b.add(line, ahead), const(offset)))
                    _dot_step(b, name, lines, k, [x_at(m) for m in range(M)], sums)
                for m in range(M):
                    for r in range(4):
                        value = total(b, sums.get(m, r))
                        if coded:
                            value = b.fmul(value, load(b, F32, x_at(m)))
                        store(b, b.fadd(value, load(b, F32, b.add(bias, at), 4 * r)), out_at(m), 4 * r)
        return context.get_dummy_value()

    return signature, emit


def _lines(b, matrix, first, count: int):
    """(address of a row of W, its grid) of ``count`` rows from ``first`` on."""
    weight, stride, scales, mins, groups, shift = cgutils.unpack_tuple(b, matrix)
    for r in (b.add(first, const(r)) for r in range(count)):
        group = b.mul(groups, r)
        yield b.add(weight, b.mul(stride, r)), (b.add(scales, group), b.add(mins, group), shift)


def _dot_step(b, name, lines, k, x_rows, sums) -> None:
    """One chunk of columns from ``k`` on."""
    if rounds(name):
        places = [code_at(b, row, k) for row in x_rows]
        for r, (line, grid) in enumerate(lines):
            integers, (scale, low) = integers_at(b, name, line, k), grid_at(b, k, grid)
            for m, place in enumerate(places):
                sums.put(m, r, dot_code(b, place, integers, scale, low, sums.get(m, r)))
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
def transpose(context, kind, matrix, width, out):
    """out[k, :32] = W[:32, k] as float32, for k < ``width``: rows of any kind to a panel."""
    name = kind.literal_value
    step = chunk(name)
    signature = types.void(kind, MATRIX, types.int64, types.int64)

    def emit(context, b, signature, arguments):
        matrix, width, out = arguments[1:]
        with loop(b, width, step) as k:
            for half in range(2):
                lines = _lines(b, matrix, const(LANES * half), LANES)
                values = [COLUMNS[name](b, line, k, grid) for line, grid in lines]
                for v in range(step // LANES):
                    for column, value in enumerate(turned(b, [row[v] for row in values])):
                        store(b, value, b.add(out, b.mul(k, const(128))), 128 * (LANES * v + column) + 64 * half)
        return context.get_dummy_value()

    return signature, emit


@intrinsic
def copy(context, x, y, count):
    """y[i] = x[i] for i < ``count``, a multiple of 16; float32."""

    def emit(context, b, signature, arguments):
        x, y, count = arguments
        with loop(b, count, LANES) as i:
            byte = b.shl(i, const(2))
            store(b, load(b, VECTOR, b.add(x, byte)), b.add(y, byte))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), emit


@intrinsic
def silu_mul(context, gate, up, out, count):
    """out[i] = silu(gate[i]) * up[i] for i < ``count``, a multiple of 16; float32."""

    def emit(context, b, signature, arguments):
        gate, up, out, count = arguments
        with loop(b, count, LANES) as i:
            byte = b.shl(i, const(2))
            g, u = (load(b, VECTOR, b.add(a, byte)) for a in (gate, up))
            one = same(1.0)
            store(b, b.fmul(b.fdiv(g, b.fadd(one, exp(b, b.fneg(g)))), u), b.add(out, byte))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), emit


@intrinsic
def axpy(context, factor, x, y, count):
    """y[i] += factor * x[i] for i < ``count``, a multiple of 16; float32."""

    def emit(context, b, signature, arguments):
        factor, x, y, count = arguments
        wide = splat(b, factor)
        with loop(b, count, LANES) as i:
            byte = b.shl(i, const(2))
            at = b.add(y, byte)
            store(b, fma(b, wide, load(b, VECTOR, b.add(x, byte)), load(b, VECTOR, at)), at)
        return context.get_dummy_value()

    return types.void(types.float32, *(types.int64,) * 3), emit
