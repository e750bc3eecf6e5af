"""Emitting vector code: what the intrinsics of :mod:`moekit.kernels._inner` are made of, in LLVM's own vectors.

A function here takes the builder ``b`` and LLVM values and emits instructions. Vectors are 16 wide. Kinds of weights:
"float32", "bfloat16", "float16", and integers in groups, "q1" to "q8" (see :mod:`moekit.formats.packed`).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

LANES = 16
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
BYTES = ir.VectorType(I8, LANES)
VNNI = "llvm.x86.avx512.vpdpbusd.512"
FEATURES = llvmlite.binding.get_host_cpu_features()


def const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def same(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def vector_of(kind: Any, values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def load(b, kind, address, offset: int = 0, align: int = 1):
    value = b.load(b.inttoptr(b.add(address, const(offset)), kind.as_pointer()))
    value.align = align
    return value


def store(b, value, address, offset: int = 0, align: int = 4) -> None:
    b.store(value, b.inttoptr(b.add(address, const(offset)), value.type.as_pointer())).align = align


def call(b, name: str, result, *arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def fma(b, x, y, z):
    return call(b, "llvm.fma.v16f32", VECTOR, x, y, z)


def splat(b, scalar):
    kind = ir.VectorType(scalar.type, LANES)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), vector_of(I32, [0] * LANES))


def prefetch(b, address) -> None:
    flags = (ir.Constant(I32, v) for v in (0, 2, 1))  # read, into the second-level cache, data
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, I8.as_pointer()), *flags)


@contextmanager
def loop(b, stop, step: int):
    """Emits the body once; yields its index, 0 <= index < stop in steps."""
    with cgutils.for_range_slice(b, const(0), stop, const(step)) as (index, _):
        yield index


def blocks(b, sizes: tuple[int, ...], count, *matrices):
    """``count`` rows in blocks of the sizes, largest first: yields once per size, to emit what is done with a block.

    Yields (size, *functions), where ``function(m)`` is the address of row m of the block, one for each of the matrices
    (address, bytes of a row).
    """
    done = cgutils.alloca_once_value(b, const(0))
    for size in sizes:
        rest = b.sub(count, b.load(done))
        with loop(b, b.sub(rest, const(size - 1)), size):
            first = b.load(done)
            rows = (_rows_from(b, start, stride, first) for start, stride in matrices)
            yield size, *rows
            b.store(b.add(first, const(size)), done)


def _rows_from(b, start, stride, first):
    origin = b.add(start, b.mul(stride, first))
    return lambda m: b.add(origin, b.mul(stride, const(m)))


class Sums:
    """A block of running sums, each 16 wide and in a register; they begin at 0."""

    def __init__(self, b, rows: int, columns: int, kind: ir.VectorType = VECTOR) -> None:
        self.b = b
        self.at = [[cgutils.alloca_once(b, kind) for _ in range(columns)] for _ in range(rows)]
        for row in self.at:
            for place in row:
                b.store(ir.Constant(kind, None), place)

    def add(self, m: int, r: int, x, y) -> None:
        """Sum m, r plus x * y; of integers, four unsigned bytes of x times signed ones of y in each place."""
        place = self.at[m][r]
        if place.type.pointee == VECTOR:
            self.b.store(fma(self.b, x, y, self.b.load(place)), place)
        else:
            self.b.store(call(self.b, VNNI, WORDS, self.b.load(place), x, y), place)

    def put(self, m: int, r: int, value) -> None:
        self.b.store(value, self.at[m][r])

    def get(self, m: int, r: int):
        return self.b.load(self.at[m][r])


# -- weights as vectors ------------------------------------------------------------------------------------------------


def _float32(b, row, column, grid):
    at = b.add(row, b.mul(column, const(4)))
    return [load(b, VECTOR, at, 64 * v) for v in range(2)]


def _bfloat16(b, row, column, grid):
    at = b.add(row, b.mul(column, const(2)))
    halves = [b.zext(load(b, ir.VectorType(I16, LANES), at, 32 * v), WORDS) for v in range(2)]
    return [b.bitcast(b.shl(h, vector_of(I32, [16] * LANES)), VECTOR) for h in halves]


def _float16(b, row, column, grid):
    at = b.add(row, b.mul(column, const(2)))
    return [b.fpext(load(b, ir.VectorType(ir.HalfType(), LANES), at, 32 * v), VECTOR) for v in range(2)]


def grid_at(b, column, grid):
    """Scale and min of a column's group, each in every place of a vector."""
    scales, mins, shift = grid
    group = b.mul(b.lshr(column, shift), const(2))
    return [splat(b, _half(b, load(b, I16, b.add(at, group), 0, 2))) for at in (scales, mins)]


def _integers(bits: int):
    """64 columns of a packed row: integers times scale plus min, the grid of their group."""

    def columns(b, row, column, grid):
        scale, low = grid_at(b, column, grid)
        packed = load(b, ir.VectorType(I8, 8 * bits), b.add(row, b.lshr(b.mul(column, const(bits)), const(3))))
        return [fma(b, q, scale, low) for q in unpack(b, packed, bits)]

    return columns


def _half(b, bits):
    return b.bitcast(b.shl(b.zext(bits, I32), ir.Constant(I32, 16)), F32)


def unpack(b, packed, bits: int) -> list:
    """64 integers of ``bits`` from 8 * bits bytes, low bits first, as four vectors of float32."""
    if bits == 8 or FEATURES.get("avx512vbmi"):
        whole = packed if bits == 8 else multishift(b, packed, bits)
        parts = [b.shuffle_vector(whole, whole, vector_of(I32, range_of(LANES * v, LANES))) for v in range(4)]
        return [b.uitofp(b.zext(p, WORDS), VECTOR) for p in parts]
    out = []
    for v in range(4):
        first = [(LANES * v + lane) * bits for lane in range(LANES)]
        zero = ir.Constant(packed.type, None)
        last = packed.type.count
        taken = [i for bit in first for i in (bit // 8, min(bit // 8 + 1, last), last, last)]
        words = b.bitcast(b.shuffle_vector(packed, zero, vector_of(I32, taken)), WORDS)
        shifted = b.lshr(words, vector_of(I32, [bit % 8 for bit in first]))
        out.append(b.uitofp(b.and_(shifted, vector_of(I32, [2**bits - 1] * LANES)), VECTOR))
    return out


def multishift(b, packed, bits: int):
    """AVX-512 VBMI: every byte of the result takes eight bits of its quadword, from any bit on."""
    taken = [bits * q + min(byte, bits - 1) for q in range(8) for byte in range(8)]
    quads = b.shuffle_vector(packed, packed, vector_of(I32, taken))
    shifts = vector_of(I8, [bits * byte for byte in range(8)] * 8)
    bytes_ = call(b, "llvm.x86.avx512.pmultishift.qb.512", quads.type, shifts, quads)
    return b.and_(bytes_, vector_of(I8, [2**bits - 1] * 64))


def range_of(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "q8": 8, "q4": 4, "q3": 3, "q2": 2, "q1": 1}
COLUMNS: dict[str, Callable] = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16}
COLUMNS |= {kind: _integers(bits) for kind, bits in BITS.items() if bits <= 8}
READY: dict[str, tuple[Callable, Callable]] = {}
"""Kinds of weights that need more for a row than :func:`row` finds: what begins it, and a function in its place."""


def row(b, matrix, r):
    """The address of row ``r`` of a matrix, and its grid: addresses of scales and mins, logarithm of the group size."""
    weight, stride, scales, mins, groups, shift, _, _ = matrix
    offset = b.mul(groups, r)
    return b.add(weight, b.mul(stride, r)), (b.add(scales, offset), b.add(mins, offset), shift)


def chunk(kind: str) -> int:
    """Columns that are loaded together; a row must be a multiple of it."""
    return 64 if BITS[kind] <= 8 else 32


# -- whole vectors -----------------------------------------------------------------------------------------------------


def total(b, vector):
    """The sum over a vector."""
    kind = ir.FunctionType(F32, [F32, VECTOR])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return b.call(function, [ir.Constant(F32, -0.0), vector], fastmath=("reassoc",))


def turned(b, rows: list) -> list:
    """A 16 x 16 transposition: blocks of 1, 2, 4 and 8 change places."""
    for size in (1, 2, 4, 8):
        low = [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
        high = [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & size):
            pair = rows[i], rows[i + size]
            rows[i], rows[i + size] = (b.shuffle_vector(*pair, vector_of(I32, taken)) for taken in (low, high))
    return rows


def exp(b, x):
    """exp to 2 units in the last place between -87 and 88, constant beyond: x = n ln 2 + r, and a series for r."""

    x = call(b, "llvm.maxnum.v16f32", VECTOR, call(b, "llvm.minnum.v16f32", VECTOR, x, same(88.0)), same(-87.0))
    n = call(b, "llvm.rint.v16f32", VECTOR, b.fmul(x, same(1.4426950408889634)))
    r = fma(b, n, same(-0.693145751953125), x)
    r = fma(b, n, same(-1.428606765330187e-06), r)
    series = same(1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        series = fma(b, series, r, same(1 / factorial))
    power = b.shl(b.fptosi(n, WORDS), vector_of(I32, [23] * LANES))
    return b.bitcast(b.add(b.bitcast(series, power.type), power), VECTOR)
