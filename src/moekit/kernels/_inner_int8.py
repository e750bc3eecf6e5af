"""More inner loops as Numba intrinsics: int8 weights, and rows of x rounded to integers (see :mod:`._inner`)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from ._codes import code_at, code_sum, fitted, rounded, write_code
from ._inner import PANEL_ROWS
from ._simd import (
    BYTES,
    F32,
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
    prefetch,
    splat,
    store,
    vector_of,
)


@intrinsic
def panel_int8(context, weight, scales, offsets, x, x_scales, count, width, bias, out, out_width):
    """The same for int8: W [width / 4, 32, 4] times ``scales`` [32], x bytes around 128 times ``x_scales`` [M].

    ``offsets`` int32 [32] is 128 times the sums of W over k, which x has too much.
    """

    def emit(context, b, signature, arguments):
        weight, scales, offsets, x, x_scales, count, width, bias, out, out_width = arguments
        at = [(load(b, WORDS, offsets, 64 * v), load(b, VECTOR, scales, 64 * v)) for v in range(2)]
        start = [load(b, VECTOR, bias, 64 * v) for v in range(2)]
        rows = (x, width), (out, b.shl(out_width, const(2))), (x_scales, const(4))
        for M, x_at, out_at, scale_at in blocks(b, PANEL_ROWS, count, *rows):
            sums, unroll = Sums(b, M, 2, WORDS), 16 if M <= 4 else 8
            with loop(b, width, unroll) as first:
                for k in (b.add(first, const(4 * u)) for u in range(unroll // 4)):
                    line = b.add(weight, b.shl(k, const(5)))
                    for v in range(2):
                        prefetch(b, b.add(line, const(4096 + 64 * v)))
                    values = [load(b, WORDS, line, 64 * v) for v in range(2)]
                    for m in range(M):
                        four = splat(b, load(b, I32, b.add(x_at(m), k), 0, 4))
                        for v in range(2):
                            sums.add(m, v, four, values[v])
            for m in range(M):
                x_scale = splat(b, load(b, F32, scale_at(m)))
                for v, (offset, scale) in enumerate(at):
                    exact = b.sitofp(b.sub(sums.get(m, v), offset), VECTOR)
                    store(b, fma(b, exact, b.fmul(scale, x_scale), start[v]), out_at(m), 64 * v)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 10), emit


@intrinsic
def round_bytes(context, x, out, scale, count):
    """out[i] = x[i] / scale rounded, plus 128; the scale takes the largest to 127, and is NaN if any of them is."""

    def emit(context, b, signature, arguments):
        x, out, scale, count = arguments
        factor, size = fitted(b, x, count, 127.0)
        store(b, size, scale)
        with loop(b, count, LANES) as i:
            near = rounded(b, load(b, VECTOR, b.add(x, b.shl(i, const(2)))), factor)
            store(b, b.trunc(b.add(near, vector_of(I32, [128] * LANES)), BYTES), b.add(out, i))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), emit


@intrinsic
def round_words(context, x, out, count):
    """A row of x as integers of 16 bits, laid out as :mod:`moekit.kernels._codes` says."""

    def emit(context, b, signature, arguments):
        x, out, count = arguments
        factor, size = fitted(b, x, count, 32000.0)
        store(b, size, out)
        with loop(b, count, 64) as i:
            source = b.add(x, b.shl(i, const(2)))
            values = [rounded(b, load(b, VECTOR, source, 64 * v), factor) for v in range(4)]
            write_code(b, code_at(b, out, i), code_sum(b, out, count, i), values)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), emit
