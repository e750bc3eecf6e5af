"""More inner loops as Numba intrinsics: panels of packed integers times rows of x in 16 bits.

A panel is 32 rows of packed weights turned to bytes [K / 4, 32, 4], then their scales and mins as stored, bfloat16
[K / 64, 2, 32]. See :mod:`moekit.kernels._codes` for x.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._codes import code_at, code_bytes, code_sum, integers_at, rounds
from ._inner import MATRIX, fetch, lines_of
from ._simd import (
    F32,
    I16,
    I32,
    LANES,
    VECTOR,
    WORDS,
    Sums,
    blocks,
    const,
    fma,
    load,
    loop,
    splat,
    store,
    turned,
    vector_of,
)

CODE_ROWS = (12, 8, 4, 2, 1)


@intrinsic(prefer_literal=True)
def turn_codes(context, kind, matrix, width, out):
    """32 rows of packed integers to a panel."""
    name = kind.literal_value
    assert rounds(name)

    def emit(context, b, signature, arguments):
        matrix, width, out = arguments[1:]
        stride = cgutils.unpack_tuple(b, matrix)[1]
        grids = b.add(out, b.shl(width, const(5)))
        with loop(b, const(2 * LANES), LANES) as half:
            lines = lines_of(b, name, matrix, half, LANES)
            with loop(b, width, 64) as k:
                fetch(b, name, lines, b.shl(stride, const(5)), k)
                panel = b.add(b.add(out, b.shl(half, const(2))), b.shl(k, const(5)))
                grid = b.add(b.add(grids, b.shl(half, const(1))), b.shl(k, const(1)))
                for column, value in enumerate(turned(b, [integers_at(b, name, row, k) for row, _ in lines])):
                    store(b, value, panel, 128 * column)
                for r, (_, (*stored, shift)) in enumerate(lines):
                    group = b.shl(b.lshr(k, shift), const(1))
                    for place, numbers in enumerate(stored):
                        number = load(b, I16, b.add(numbers, group), 0, 2)
                        store(b, number, grid, 64 * place + 2 * r, 2)
        return context.get_dummy_value()

    return types.void(kind, MATRIX, types.int64, types.int64), emit


@intrinsic
def panel_codes(context, panel, codes, count, width, bias, out, out_width):
    """out[m, :32] = bias[:32] + panel . x[m] for ``count`` rows of x; ``out`` float32."""

    def emit(context, b, signature, arguments):
        panel, codes, count, width, bias, out, out_width = arguments
        rows = (codes, code_bytes(b, width)), (out, b.shl(out_width, const(2)))
        grids = b.add(panel, b.shl(width, const(5)))
        for M, x_at, out_at in blocks(b, CODE_ROWS, count, *rows):
            for m in range(M):
                for v in range(2):
                    store(b, ir.Constant(VECTOR, None), out_at(m), 64 * v)
            with loop(b, width, 64) as k:
                sums = Sums(b, M, 2, WORDS)
                weights, x = b.add(panel, b.shl(k, const(5))), [code_at(b, x_at(m), k) for m in range(M)]
                for byte in range(2):
                    if byte:
                        for m in range(M):
                            for v in range(2):
                                sums.put(m, v, b.shl(sums.get(m, v), vector_of(I32, [8] * LANES)))
                    _chunk(b, sums, weights, x, 64 * byte)
                scales, mins = _grids(b, b.add(grids, b.shl(k, const(1))))
                for m in range(M):
                    whole = splat(b, load(b, F32, code_sum(b, x_at(m), width, k), 0, 4))
                    for v in range(2):
                        value = fma(b, mins[v], whole, load(b, VECTOR, out_at(m), 64 * v))
                        store(b, fma(b, b.sitofp(sums.get(m, v), VECTOR), scales[v], value), out_at(m), 64 * v)
            for m in range(M):
                size = splat(b, load(b, F32, x_at(m)))
                for v in range(2):
                    value = fma(b, load(b, VECTOR, out_at(m), 64 * v), size, load(b, VECTOR, bias, 64 * v))
                    store(b, value, out_at(m), 64 * v)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7), emit


def _chunk(b, sums, weights, x, offset: int) -> None:
    """Sums plus the products of 64 columns with the high (offset 0) or low (64) bytes of x."""
    unroll = 4
    with loop(b, const(64), 4 * unroll) as first:
        for u in range(unroll):
            k = b.add(first, const(4 * u))
            values = [load(b, WORDS, b.add(weights, b.shl(k, const(5))), 64 * v) for v in range(2)]
            for m, row in enumerate(x):
                four = splat(b, load(b, I32, b.add(row, k), offset, 4))
                for v in range(2):
                    sums.add(m, v, values[v], four)


def _grids(b, at) -> list:
    """Scales and mins of a chunk, two vectors each."""
    words = [b.zext(load(b, ir.VectorType(I16, LANES), at, 32 * i), WORDS) for i in range(4)]
    wide = [b.bitcast(b.shl(w, vector_of(I32, [16] * LANES)), VECTOR) for w in words]
    return [wide[:2], wide[2:]]
