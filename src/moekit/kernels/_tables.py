"""Weights that are looked up: the few values of a group lie in a register, and the stored bits say which is meant.

Kinds of weights, beside those of :mod:`moekit.kernels._simd`: "n2.4" is nested, a base of 2 bits read up to 4 of
them (see :mod:`moekit.formats.nested`), the base and its planes read where they lie; "ternary" is two bits a weight, 1
and 2 for a row's levels and 0 for zero. A weight is exactly the sum that decoding gives, so x stays float32.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from itertools import count

from llvmlite import ir

from ._simd import (
    BITS,
    COLUMNS,
    F32,
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    READY,
    VECTOR,
    WORDS,
    call,
    const,
    fma,
    load,
    loop,
    prefetch,
    same,
    splat,
    store,
    vector_of,
)

QUADS = ir.VectorType(I64, 8)
BYTES_64 = ir.VectorType(I8, 64)
TABLE = 4
"""Bits of an index: a register holds 16 values."""

COLUMN = [LANES * (place % 4) + place // 4 for place in range(64)]
"""Which of 64 columns each byte of an index belongs to: a shift by 8 bits then gives the next 16 columns in order."""


def half(b, address):
    """A bfloat16 number as float32, in every place of a vector."""
    return b.bitcast(splat(b, b.shl(b.zext(load(b, I16, address, 0, 2), I32), ir.Constant(I32, 16))), VECTOR)


def floats(values) -> ir.Constant:
    return ir.Constant(VECTOR, [float(v) for v in values])


def base_bytes(b, address, bits: int):
    """64 packed integers as bytes in the order of COLUMN; bits above the integer are not cleared."""
    packed = load(b, ir.VectorType(I8, 8 * bits), address)
    if not FEATURES.get("avx512vbmi"):
        return _plain_bytes(b, packed, [bits * column for column in COLUMN])
    taken, shifts = [], []
    for quad in (COLUMN[8 * q : 8 * q + 8] for q in range(8)):
        needed = sorted({bit // 8 for c in quad for bit in (c * bits, c * bits + bits - 1)})
        assert len(needed) <= 8
        shifts += [8 * needed.index(c * bits // 8) + c * bits % 8 for c in quad]
        taken += needed + needed[-1:] * (8 - len(needed))
    quads = b.shuffle_vector(packed, packed, vector_of(I32, taken))
    return call(b, "llvm.x86.avx512.pmultishift.qb.512", BYTES_64, vector_of(I8, shifts), quads)


def with_plane(b, index, address, place: int):
    """The index with 64 signs in bit ``place`` of its bytes."""
    bit = 2**place
    if FEATURES.get("avx512vbmi"):
        quad = load(b, I64, address)
        first = b.insert_element(ir.Constant(QUADS, ir.Undefined), quad, ir.Constant(I32, 0))
        quads = b.shuffle_vector(first, ir.Constant(QUADS, ir.Undefined), vector_of(I32, [0] * 8))
        shifts = vector_of(I8, [(column - place) % 64 for column in COLUMN])
        signs = call(b, "llvm.x86.avx512.pmultishift.qb.512", BYTES_64, shifts, b.bitcast(quads, BYTES_64))
    else:
        packed = load(b, ir.VectorType(I8, 8), address)
        signs = b.shl(_plain_bytes(b, packed, COLUMN), vector_of(I8, [place] * 64))
    places = (b.bitcast(value, WORDS) for value in (vector_of(I8, [bit] * 64), signs, index))
    chosen = call(b, "llvm.x86.avx512.pternlog.d.512", WORDS, *places, ir.Constant(I32, 0xCA))
    return b.bitcast(chosen, BYTES_64)


def _plain_bytes(b, packed, bits: list[int]):
    """Bytes that begin at any bit of a vector of bytes, without the instruction for it."""
    zero, last = ir.Constant(packed.type, None), packed.type.count
    words = ir.VectorType(I16, 64)
    pairs = [i for bit in bits for i in (bit // 8, min(bit // 8 + 1, last))]
    both = b.bitcast(b.shuffle_vector(packed, zero, vector_of(I32, pairs)), words)
    return b.trunc(b.lshr(both, vector_of(I16, [bit % 8 for bit in bits])), BYTES_64)


def looked_up(b, index, table, shift: int = 0):
    """Four vectors of 16 columns: the values that bits ``shift`` to ``shift`` + 3 of every byte name."""
    words = b.bitcast(index, WORDS)
    out = []
    for v in range(4):
        places = b.lshr(words, vector_of(I32, [8 * v + shift] * LANES)) if v or shift else words
        out.append(call(b, "llvm.x86.avx512.permvar.sf.512", VECTOR, table, places))
    return out


def nested(base: int, bits: int):
    """Emits 64 columns of a nested row; ``grid``: the group size's logarithm, its numbers in float32, its signs."""

    def columns(b, row, column, grid):
        shift, (scales, mins, *steps), signs = grid
        group, at = b.shl(b.lshr(column, shift), const(2)), b.lshr(column, const(3))
        scale, low, *steps = (splat(b, load(b, F32, b.add(numbers, group), 0, 4)) for numbers in (scales, mins, *steps))
        index = base_bytes(b, b.add(row, b.mul(at, const(base))), base)
        tables = [fma(b, scale, floats(lane % 2**base for lane in range(LANES)), low)]
        for place, sign, step in zip(count(base), signs, steps, strict=False):
            index = with_plane(b, index, b.add(sign, at), place)
            plus = floats(1 if lane >> place % TABLE & 1 else -1 for lane in range(LANES))
            if place == TABLE:
                tables.append(b.fmul(step, plus))
            else:
                tables[-1] = fma(b, step, plus, tables[-1])
        values = looked_up(b, index, tables[0])
        for table in tables[1:]:
            values = [b.fadd(x, y) for x, y in zip(values, looked_up(b, index, table, TABLE), strict=True)]
        return values

    return columns


def nested_row(base: int, bits: int):
    """(begin, row) of nested weights, as of :data:`READY`."""

    def places(b, matrix, r, room):
        """Addresses of a row's base, of its signs, and of its scales, mins and steps, as stored and in float32."""
        weight, stride, scales, mins, groups, _, planes, first = matrix
        row, size, offset = b.add(first, r), b.udiv(stride, const(base)), b.mul(groups, r)
        found = [[load(b, I64, planes, 16 * p + 8 * leaf) for p in range(bits - base)] for leaf in range(2)]
        signs = [b.add(sign, b.mul(size, row)) for sign in found[0]]
        steps = [b.add(step, b.mul(groups, row)) for step in found[1]]
        stored = [b.add(scales, offset), b.add(mins, offset), *steps]
        wide = [b.add(room, b.mul(groups, const(2 * place))) for place in range(len(stored))]
        return b.add(weight, b.mul(stride, r)), signs, stored, wide

    def begin(b, matrix, r, room):
        weight, signs, stored, wide = places(b, matrix, r, room)
        stride, groups = matrix[1], matrix[4]
        for size, arrays in ((stride, [weight]), (b.udiv(stride, const(base)), signs), (groups, stored)):
            if arrays:
                _fetch(b, size, arrays)
        _widen(b, stored, wide, b.lshr(groups, const(1)))

    def row(b, matrix, r, room):
        weight, signs, _, wide = places(b, matrix, r, room)
        return weight, (matrix[5], wide, signs)

    return begin, row


def _widen(b, stored, wide, many) -> None:
    """bfloat16 to float32, ``many`` of each array."""
    whole = b.and_(many, const(-LANES))
    with loop(b, whole, LANES) as i:
        for source, target in zip(stored, wide, strict=True):
            words = b.zext(load(b, ir.VectorType(I16, LANES), b.add(source, b.shl(i, const(1)))), WORDS)
            store(b, b.shl(words, vector_of(I32, [16] * LANES)), b.add(target, b.shl(i, const(2))))
    with loop(b, b.sub(many, whole), 1) as rest:
        i = b.add(whole, rest)
        for source, target in zip(stored, wide, strict=True):
            number = b.zext(load(b, I16, b.add(source, b.shl(i, const(1))), 0, 2), I32)
            store(b, b.shl(number, ir.Constant(I32, 16)), b.add(target, b.shl(i, const(2))))


def _fetch(b, size, places) -> None:
    """Arrays of ``size`` bytes a row: what is read eight rows on."""
    with loop(b, size, 64) as i:
        for place in places:
            prefetch(b, b.add(b.add(place, b.shl(size, const(3))), i))


def _ternary(b, row, column, grid):
    """64 columns of two bits each."""
    return looked_up(b, base_bytes(b, b.add(row, b.lshr(column, const(2))), 2), grid)


def _begin_ternary(b, matrix, r, room) -> None:
    _fetch(b, matrix[1], [b.add(matrix[0], b.mul(matrix[1], r))])


def _ternary_row(b, matrix, r, room):
    """With the table of its levels, which are neighbours: low and high."""
    at, levels = b.add(matrix[0], b.mul(matrix[1], r)), b.add(matrix[2], b.mul(matrix[4], r))
    table = same(0.0)
    for symbol in (1, 2):
        named = vector_of(ir.IntType(1), [lane % 4 == symbol for lane in range(LANES)])
        table = b.select(named, half(b, b.add(levels, const(2 * symbol - 2))), table)
    return at, table


def nested_kind(base: int, bits: int) -> str:
    """The kind of nested weights with this base, read up to this width."""
    return f"n{base}.{bits}"


for _base in range(1, 5):
    for _bits in range(_base + 1, 9):
        _name = nested_kind(_base, _bits)
        BITS[_name], COLUMNS[_name], READY[_name] = _base, nested(_base, _bits), nested_row(_base, _bits)
BITS["ternary"], COLUMNS["ternary"], READY["ternary"] = 2, _ternary, (_begin_ternary, _ternary_row)
