"""The inner loops of expert products as Numba intrinsics.

Numba cannot say which values stay in registers; these can. All take addresses as integers; a kind of weights must be a
literal, as it chooses the code that is emitted (:mod:`moekit.kernels._simd`). float32 unless said otherwise.
Shapes by suffix: M rows of x, N rows and K columns of a weight matrix.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._simd import (
    BITS,
    COLUMNS,
    F32,
    I8,
    I32,
    I64,
    LANES,
    VECTOR,
    WORDS,
    Sums,
    blocks,
    call,
    chunk,
    const,
    exp,
    fma,
    load,
    loop,
    prefetch,
    range_of,
    same,
    splat,
    store,
    total,
    turned,
    vector_of,
)


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


@intrinsic(prefer_literal=True)
def dot(context, kind, weight, stride, scales, mins, scale_stride, shift, x, count, width, bias, out, out_width):
    """out[m, r] = bias[r] + W[r] . x[m] for 4 rows of W and ``count`` rows of x, ``width`` long and float32.

    ``stride`` and ``scale_stride`` are bytes of a row of W and of its scales, ``shift`` the logarithm of the group
    size; ``out_width`` is in float32. W is read where it lies, and what comes next is fetched ahead.
    """
    name = kind.literal_value
    step, signature = chunk(name), types.void(kind, *(types.int64,) * 12)

    def emit(context, b, signature, arguments):
        weight, stride, scales, mins, scale_stride, shift, x, count, width, bias, out, out_width = arguments[1:]
        lines = [(b.add(weight, b.mul(stride, const(r))), b.mul(scale_stride, const(r))) for r in range(4)]
        ahead = b.mul(stride, const(8))
        for M, x_at, out_at in blocks(
            b, (6, 4, 3, 2, 1), count, (x, b.shl(width, const(2))), (out, b.shl(out_width, const(2)))
        ):
            sums = Sums(b, M, 4)
            with loop(b, width, step) as k:
                byte, values = b.lshr(b.mul(k, const(BITS[name])), const(3)), []
                for line, scale in lines:
                    for offset in range(0, step * BITS[name] // 8, 64):
                        prefetch(b, b.add(b.add(b.add(line, ahead), byte), const(offset)))
                    values.append(COLUMNS[name](b, line, k, (b.add(scales, scale), b.add(mins, scale), shift)))
                for v in range(step // LANES):
                    for m in range(M):
                        part = load(b, VECTOR, b.add(x_at(m), b.shl(k, const(2))), 64 * v)
                        for r in range(4):
                            sums.add(m, r, values[r][v], part)
            for m in range(M):
                for r in range(4):
                    store(b, b.fadd(total(b, sums.get(m, r)), load(b, F32, bias, 4 * r)), out_at(m), 4 * r)
        return context.get_dummy_value()

    return signature, emit


PANEL_ROWS = (12, 8, 6, 4, 3, 2, 1)


@intrinsic(prefer_literal=True)
def panel(context, kind, weight, stride, x, count, width, bias, out, out_width):
    """out[m, :32] = bias[:32] + sum over k of x[m, k] * W[k, :32], for ``count`` rows of x, ``width`` long.

    ``stride`` is bytes between W[k] and W[k + 1]; x and ``out`` are float32.
    """
    name, signature = kind.literal_value, types.void(kind, *(types.int64,) * 8)

    def emit(context, b, signature, arguments):
        weight, stride, x, count, width, bias, out, out_width = arguments[1:]
        start = [load(b, VECTOR, bias, 64 * v) for v in range(2)]
        rows = (x, b.shl(width, const(2))), (out, b.shl(out_width, const(2)))
        for M, x_at, out_at in blocks(b, PANEL_ROWS, count, *rows):
            unroll = 4 if M <= 3 else 2 if M <= 6 else 1  # each with sums of its own, as far as registers go
            sums = Sums(b, M, 2 * unroll)
            with loop(b, width, unroll) as first:
                for u in range(unroll):
                    k = b.add(first, const(u))
                    line = b.add(weight, b.mul(k, stride))
                    for offset in range(0, 4 * BITS[name], 64):
                        prefetch(b, b.add(line, const(4096 + offset)))
                    values = COLUMNS[name](b, line, const(0), None)
                    for m in range(M):
                        one = splat(b, load(b, F32, b.add(x_at(m), b.shl(k, const(2))), 0, 4))
                        for v in range(2):
                            sums.add(m, 2 * u + v, one, values[v])
            for m in range(M):
                for v in range(2):
                    value = start[v]
                    for u in range(unroll):
                        value = b.fadd(value, sums.get(m, 2 * u + v))
                    store(b, value, out_at(m), 64 * v)
        return context.get_dummy_value()

    return signature, emit


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
def quantise(context, x, out, scale, count):
    """out[i] = x[i] / scale rounded, plus 128; the scale takes the largest to 127, and is NaN if any of them is."""

    def emit(context, b, signature, arguments):
        x, out, scale, count = arguments
        largest = cgutils.alloca_once_value(b, same(1e-30))
        with loop(b, count, LANES) as i:
            size = call(b, "llvm.fabs.v16f32", VECTOR, load(b, VECTOR, b.add(x, b.shl(i, const(2)))))
            b.store(call(b, "llvm.maximum.v16f32", VECTOR, size, b.load(largest)), largest)
        top = call(b, "llvm.vector.reduce.fmaximum.v16f32", F32, b.load(largest))
        store(b, b.fdiv(top, ir.Constant(F32, 127.0)), scale)
        factor = splat(b, b.fdiv(ir.Constant(F32, 127.0), top))
        with loop(b, count, LANES) as i:
            scaled = b.fmul(load(b, VECTOR, b.add(x, b.shl(i, const(2)))), factor)
            near = b.fptosi(call(b, "llvm.rint.v16f32", VECTOR, scaled), WORDS)
            store(b, b.trunc(b.add(near, vector_of(I32, [128] * LANES)), ir.VectorType(I8, LANES)), b.add(out, i))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), emit


@intrinsic(prefer_literal=True)
def transpose(context, kind, weight, stride, scales, mins, scale_stride, shift, width, out):
    """out[k, :32] = W[:32, k] as float32, for k < ``width``: rows of any kind to a panel."""
    name = kind.literal_value
    step = chunk(name)
    signature = types.void(kind, *(types.int64,) * 8)

    def emit(context, b, signature, arguments):
        weight, stride, scales, mins, scale_stride, shift, width, out = arguments[1:]
        with loop(b, width, step) as k:
            for half in range(2):
                rows = range_of(LANES * half, LANES)
                at = [(b.add(weight, b.mul(stride, const(r))), b.mul(scale_stride, const(r))) for r in rows]
                values = [COLUMNS[name](b, w, k, (b.add(scales, s), b.add(mins, s), shift)) for w, s in at]
                for v in range(step // LANES):
                    for column, value in enumerate(turned(b, [row[v] for row in values])):
                        store(b, value, b.add(out, b.mul(k, const(128))), 128 * (LANES * v + column) + 64 * half)
        return context.get_dummy_value()

    return signature, emit


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
