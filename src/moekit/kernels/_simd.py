"""Vector code as Numba intrinsics: the inner loops of expert products, written in LLVM's own vectors of 16 float32.

Numba cannot say which values stay in registers; these intrinsics can. All take addresses as integers, and the first
arguments (a kind of weights, block sizes) must be literals: they choose the code that is emitted. Kinds of weights:
"float32", "bfloat16", "float16", and integers in groups "q2", "q3", "q4", "q8" (see :mod:`moekit.formats.packed`).
Shapes by suffix: M rows of x, N rows and K columns of a weight matrix.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
FEATURES = llvmlite.binding.get_host_cpu_features()


def const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def vector_of(kind: Any, values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def load(b, kind, address, offset: int = 0, align: int = 1):
    value = b.load(b.inttoptr(b.add(address, const(offset)), kind.as_pointer()))
    value.align = align
    return value


def store(b, value, address, offset: int = 0) -> None:
    b.store(value, b.inttoptr(b.add(address, const(offset)), value.type.as_pointer())).align = 4


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
    (address, width) of float32.
    """
    done = cgutils.alloca_once_value(b, const(0))
    for size in sizes:
        rest = b.sub(count, b.load(done))
        with loop(b, b.sub(rest, const(size - 1)), size):
            first = b.load(done)
            rows = (_rows_from(b, start, width, first) for start, width in matrices)
            yield size, *rows
            b.store(b.add(first, const(size)), done)


def _rows_from(b, start, width, first):
    origin, row = b.add(start, b.shl(b.mul(width, first), const(2))), b.shl(width, const(2))
    return lambda m: b.add(origin, b.mul(row, const(m)))


class Sums:
    """A block of running sums, each 16 wide and in a register; they begin at 0."""

    def __init__(self, b, rows: int, columns: int) -> None:
        self.b = b
        self.at = [[cgutils.alloca_once(b, VECTOR) for _ in range(columns)] for _ in range(rows)]
        for m in range(rows):
            for r in range(columns):
                self.start(m, r, ir.Constant(VECTOR, None))

    def start(self, m: int, r: int, value) -> None:
        self.b.store(value, self.at[m][r])

    def add(self, m: int, r: int, x, y) -> None:
        self.b.store(fma(self.b, x, y, self.b.load(self.at[m][r])), self.at[m][r])

    def get(self, m: int, r: int):
        return self.b.load(self.at[m][r])


# -- weights as vectors ------------------------------------------------------------------------------------------------


def _float32(b, row, column, grid):
    at = b.add(row, b.mul(column, const(4)))
    return [load(b, VECTOR, at, 64 * v) for v in range(2)]


def _bfloat16(b, row, column, grid):
    at, wide = b.add(row, b.mul(column, const(2))), ir.VectorType(I32, LANES)
    halves = [b.zext(load(b, ir.VectorType(I16, LANES), at, 32 * v), wide) for v in range(2)]
    return [b.bitcast(b.shl(h, vector_of(I32, [16] * LANES)), VECTOR) for h in halves]


def _float16(b, row, column, grid):
    at = b.add(row, b.mul(column, const(2)))
    return [b.fpext(load(b, ir.VectorType(ir.HalfType(), LANES), at, 32 * v), VECTOR) for v in range(2)]


def _integers(bits: int):
    """64 columns of a packed row: integers times scale plus min, the grid of their group."""

    def columns(b, row, column, grid):
        scales, mins, shift = grid
        group = b.mul(b.lshr(column, shift), const(2))
        scale, low = (splat(b, _half(b, load(b, I16, b.add(at, group), 0, 2))) for at in (scales, mins))
        packed = load(b, ir.VectorType(I8, 8 * bits), b.add(row, b.lshr(b.mul(column, const(bits)), const(3))))
        return [fma(b, q, scale, low) for q in unpack(b, packed, bits)]

    return columns


def _half(b, bits):
    return b.bitcast(b.shl(b.zext(bits, I32), ir.Constant(I32, 16)), F32)


def unpack(b, packed, bits: int) -> list:
    """64 integers of ``bits`` from 8 * bits bytes, low bits first, as four vectors of float32."""
    if bits == 8 or FEATURES.get("avx512vbmi"):
        whole = packed if bits == 8 else _multishift(b, packed, bits)
        parts = [b.shuffle_vector(whole, whole, vector_of(I32, range_of(LANES * v, LANES))) for v in range(4)]
        return [b.uitofp(b.zext(p, ir.VectorType(I32, LANES)), VECTOR) for p in parts]
    out = []
    for v in range(4):
        first = [(LANES * v + lane) * bits for lane in range(LANES)]
        zero = ir.Constant(packed.type, None)
        last = packed.type.count
        taken = [i for bit in first for i in (bit // 8, min(bit // 8 + 1, last), last, last)]
        words = b.bitcast(b.shuffle_vector(packed, zero, vector_of(I32, taken)), ir.VectorType(I32, LANES))
        shifted = b.lshr(words, vector_of(I32, [bit % 8 for bit in first]))
        out.append(b.uitofp(b.and_(shifted, vector_of(I32, [2**bits - 1] * LANES)), VECTOR))
    return out


def _multishift(b, packed, bits: int):
    """AVX-512 VBMI: every byte of the result takes eight bits of its quadword, from any bit on."""
    taken = [bits * q + min(byte, bits - 1) for q in range(8) for byte in range(8)]
    quads = b.shuffle_vector(packed, packed, vector_of(I32, taken))
    shifts = vector_of(I8, [bits * byte for byte in range(8)] * 8)
    bytes_ = call(b, "llvm.x86.avx512.pmultishift.qb.512", quads.type, shifts, quads)
    return b.and_(bytes_, vector_of(I8, [2**bits - 1] * 64))


def range_of(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "q8": 8, "q4": 4, "q3": 3, "q2": 2}
COLUMNS: dict[str, Callable] = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16}
COLUMNS |= {kind: _integers(bits) for kind, bits in BITS.items() if bits <= 8}


def chunk(kind: str) -> int:
    """Columns that are loaded together; a row must be a multiple of it."""
    return 64 if BITS[kind] <= 8 else 32


# -- the intrinsics ----------------------------------------------------------------------------------------------------


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
        for M, x_at, out_at in blocks(b, (6, 4, 3, 2, 1), count, (x, width), (out, out_width)):
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
                    store(b, b.fadd(_total(b, sums.get(m, r)), load(b, F32, bias, 4 * r)), out_at(m), 4 * r)
        return context.get_dummy_value()

    return signature, emit


def _total(b, vector):
    kind = ir.FunctionType(F32, [F32, VECTOR])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return b.call(function, [ir.Constant(F32, -0.0), vector], fastmath=("reassoc",))


@intrinsic(prefer_literal=True)
def panel(context, kind, weight, stride, x, count, width, bias, out, out_width):
    """out[m, :32] = bias[:32] + sum over k of x[m, k] * W[k, :32], for ``count`` rows of x, ``width`` long.

    ``stride`` is bytes between W[k] and W[k + 1]; x and ``out`` are float32.
    """
    name, signature = kind.literal_value, types.void(kind, *(types.int64,) * 8)

    def emit(context, b, signature, arguments):
        weight, stride, x, count, width, bias, out, out_width = arguments[1:]
        for M, x_at, out_at in blocks(b, (12, 8, 6, 4, 3, 2, 1), count, (x, width), (out, out_width)):
            sums, unroll = Sums(b, M, 2), 4 if M <= 4 else 2
            for v in range(2):
                start = load(b, VECTOR, bias, 64 * v)
                for m in range(M):
                    sums.start(m, v, start)
            with loop(b, width, unroll) as first:
                for k in (b.add(first, const(u)) for u in range(unroll)):
                    line = b.add(weight, b.mul(k, stride))
                    for offset in range(0, 4 * BITS[name], 64):
                        prefetch(b, b.add(line, const(4096 + offset)))
                    values = COLUMNS[name](b, line, const(0), None)
                    for m in range(M):
                        one = splat(b, load(b, F32, b.add(x_at(m), b.shl(k, const(2))), 0, 4))
                        for v in range(2):
                            sums.add(m, v, one, values[v])
            for m in range(M):
                for v in range(2):
                    store(b, sums.get(m, v), out_at(m), 64 * v)
        return context.get_dummy_value()

    return signature, emit


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
                    for column, value in enumerate(_turned(b, [row[v] for row in values])):
                        store(b, value, b.add(out, b.mul(k, const(128))), 128 * (LANES * v + column) + 64 * half)
        return context.get_dummy_value()

    return signature, emit


def _turned(b, rows: list) -> list:
    """A 16 x 16 transposition: blocks of 1, 2, 4 and 8 change places."""
    for size in (1, 2, 4, 8):
        low = [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
        high = [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & size):
            pair = rows[i], rows[i + size]
            rows[i], rows[i + size] = (b.shuffle_vector(*pair, vector_of(I32, taken)) for taken in (low, high))
    return rows


@intrinsic
def silu_mul(context, gate, up, out, count):
    """out[i] = silu(gate[i]) * up[i] for i < ``count``, a multiple of 16; float32."""

    def emit(context, b, signature, arguments):
        gate, up, out, count = arguments
        with loop(b, count, LANES) as i:
            byte = b.shl(i, const(2))
            g, u = (load(b, VECTOR, b.add(a, byte)) for a in (gate, up))
            one = ir.Constant(VECTOR, [1.0] * LANES)
            store(b, b.fmul(b.fdiv(g, b.fadd(one, _exp(b, b.fneg(g)))), u), b.add(out, byte))
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


def _exp(b, x):
    """exp to 2 units in the last place between -87 and 88, constant beyond: x = n ln 2 + r, and a series for r."""

    def constant(value):
        return ir.Constant(VECTOR, [value] * LANES)

    x = call(b, "llvm.maxnum.v16f32", VECTOR, call(b, "llvm.minnum.v16f32", VECTOR, x, constant(88.0)), constant(-87.0))
    n = call(b, "llvm.rint.v16f32", VECTOR, b.fmul(x, constant(1.4426950408889634)))
    r = fma(b, n, constant(-0.693145751953125), x)
    r = fma(b, n, constant(-1.428606765330187e-06), r)
    series = constant(1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        series = fma(b, series, r, constant(1 / factorial))
    power = b.shl(b.fptosi(n, ir.VectorType(I32, LANES)), vector_of(I32, [23] * LANES))
    return b.bitcast(b.add(b.bitcast(series, power.type), power), VECTOR)
