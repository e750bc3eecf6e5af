"""Unpacking integers in one pass, compiled by Numba where it is installed; torch needs one pass per step instead.

For CPUs and sizes that the fused kernels are not compiled for. ``bits`` is a constant of each compiled function: with
shifts as variables the loops are not vectorised and 8 times slower. Shapes by suffix: N output and K input columns of a
product, B packed bytes of a row, C groups of a row, P planes (integers in the smallest whole unit of a packed row).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from math import gcd

from numba import njit
from numpy import float32, int32

from ..formats.numba_cache import KEEPS

compiled = njit(nogil=True, fastmath=True, cache=KEEPS)


@cache
def fill(bits: int):
    """out[n, p, :] = integers * scale, plane by plane."""
    planes = 8 // gcd(8, bits)
    unit, mask = planes * bits // 8, 2**bits - 1

    @compiled
    def run(packed_NB, scales_NC, out_NPK, group):
        width = group // planes
        for n in range(packed_NB.shape[0]):
            for c in range(scales_NC.shape[1]):
                scale, start = scales_NC[n, c], c * width
                for i in range(width):
                    j = start + i
                    word = int32(0)
                    for byte in range(unit):
                        word |= int32(packed_NB[n, unit * j + byte]) << (8 * byte)
                    for p in range(planes):
                        out_NPK[n, p, j] = float32((word >> (bits * p)) & mask) * scale

    return run


@cache
def multiply(bits: int):
    """out += (integers * scales) @ x for one row of x, without unpacking to memory."""
    planes = 8 // gcd(8, bits)
    unit, mask = planes * bits // 8, 2**bits - 1

    @compiled
    def run(packed_NB, scales_NC, x_PK, out_N, group):
        width = group // planes
        for n in range(packed_NB.shape[0]):
            total = float32(0)
            for c in range(scales_NC.shape[1]):
                part, start = float32(0), c * width
                for i in range(width):
                    j = start + i
                    word = int32(0)
                    for byte in range(unit):
                        word |= int32(packed_NB[n, unit * j + byte]) << (8 * byte)
                    for p in range(planes):
                        part += float32((word >> (bits * p)) & mask) * x_PK[p, j]
                total += part * scales_NC[n, c]
            out_N[n] += total

    return run
