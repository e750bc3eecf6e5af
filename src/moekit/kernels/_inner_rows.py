"""More inner loops as Numba intrinsics: rows of numbers, moved, activated and added up (see :mod:`._inner`)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from ._simd import LANES, VECTOR, const, exp, fma, load, loop, same, splat, store


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
