"""Rows of x as integers of 16 bits, and their products with packed integers: four bytes at once by AVX-512 VNNI.

A value is ``scale * (256 * high + low)`` with two signed bytes, so a product with an unsigned byte of weights is two of
VNNI's. Rounding x to 16 bits costs about 2e-5 of a product's norm. In memory a row of x is 64 bytes that begin with its
scale, and for every 64 columns 64 high bytes, 64 low bytes and 16 partial sums as float32, which go with the mins;
behind all of them their totals, one for every 64 columns.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from ._simd import (
    BITS,
    BYTES,
    F32,
    FEATURES,
    I8,
    I32,
    LANES,
    VECTOR,
    VNNI,
    WORDS,
    call,
    const,
    fma,
    load,
    loop,
    multishift,
    same,
    splat,
    store,
    total,
    vector_of,
)

LARGEST = 32000.0


def rounds(kind: str) -> bool:
    """Whether products with weights of this kind take x in 16 bits on this CPU."""
    return kind.startswith("q") and all(FEATURES.get(name) for name in ("avx512vnni", "avx512vbmi"))


def code_size(width: int) -> int:
    """Bytes of a row of ``width`` columns."""
    return 64 + 3 * width + (width // 16 + 63) // 64 * 64


def code_bytes(b, width):
    """The same, emitted."""
    sums = b.and_(b.add(b.lshr(width, const(4)), const(63)), const(-64))
    return b.add(b.add(b.mul(width, const(3)), const(64)), sums)


def code_sum(b, row, width, column):
    """The address of the sum of 64 columns of a row."""
    return b.add(b.add(row, b.add(b.mul(width, const(3)), const(64))), b.lshr(column, const(4)))


def code_at(b, row, column):
    """The address of 64 columns of a row."""
    return b.add(b.add(row, const(64)), b.mul(column, const(3)))


def integers_at(b, kind: str, row, column):
    """64 columns of a packed row as unsigned bytes, in a vector of 16 words."""
    bits = BITS[kind]
    start = b.add(row, b.lshr(b.mul(column, const(bits)), const(3)))
    packed = load(b, ir.VectorType(I8, 8 * bits), start)
    return b.bitcast(packed if bits == 8 else multishift(b, packed, bits), WORDS)


def dot_code(b, at, integers, scale, low, running):
    """``running`` plus the products of 64 columns, in units of x's scale."""
    zero = ir.Constant(WORDS, None)
    high = call(b, VNNI, WORDS, zero, integers, load(b, WORDS, at))
    both = call(b, VNNI, WORDS, b.shl(high, vector_of(I32, [8] * LANES)), integers, load(b, WORDS, at, 64))
    return fma(b, b.sitofp(both, VECTOR), scale, fma(b, low, load(b, VECTOR, at, 128), running))


def write_code(b, at, whole, values: list) -> None:
    """64 columns, given as four vectors of integers; their sum goes to ``whole``."""
    for v, value in enumerate(values):
        high = b.ashr(b.add(value, vector_of(I32, [128] * LANES)), vector_of(I32, [8] * LANES))
        for part, offset in ((high, 0), (b.sub(value, b.shl(high, vector_of(I32, [8] * LANES))), 64)):
            store(b, b.trunc(part, BYTES), at, offset + LANES * v)
    first, *others = values
    for other in others:
        first = b.add(first, other)
    parts = b.sitofp(first, VECTOR)
    store(b, parts, at, 128)
    store(b, total(b, parts), whole)


def fitted(b, x, count, most: float):
    """(factor that takes the largest of x to ``most``, as a vector; its inverse): NaN if any of x is."""
    largest = cgutils.alloca_once_value(b, same(1e-30))
    b.store(same(1e-30), largest)
    with loop(b, count, LANES) as i:
        size = call(b, "llvm.fabs.v16f32", VECTOR, load(b, VECTOR, b.add(x, b.shl(i, const(2)))))
        b.store(call(b, "llvm.maximum.v16f32", VECTOR, size, b.load(largest)), largest)
    top = call(b, "llvm.vector.reduce.fmaximum.v16f32", F32, b.load(largest))
    return splat(b, b.fdiv(ir.Constant(F32, most), top)), b.fdiv(top, ir.Constant(F32, most))


def rounded(b, vector, factor):
    """``vector * factor`` as whole numbers."""
    return b.fptosi(call(b, "llvm.rint.v16f32", VECTOR, b.fmul(vector, factor)), WORDS)
