"""Unpacking integers in one pass, compiled by Numba where it is installed; torch needs one pass per step instead.

One function per width, shifts and masks written out: with shifts as variables, or an index that could be negative for
all the compiler knows, the loops are not vectorised and 8 times slower.
``fill*``: out[n, p, :] = integer * scale, plane by plane. ``gemv*``: out += (integers * scales) @ x for one row of x,
without unpacking to memory. Shapes by suffix: N output and K input columns of a product, B packed bytes of a row,
C groups of a row, P planes (integers in the smallest whole unit of a packed row).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import njit
from numpy import float32, int32

compiled = njit(nogil=True, fastmath=True, cache=True)


@compiled
def fill8(packed_NB, scales_NC, out_NPK, group):
    for n in range(packed_NB.shape[0]):
        for c in range(scales_NC.shape[1]):
            scale, start = scales_NC[n, c], c * group
            for i in range(group):
                j = start + i
                out_NPK[n, 0, j] = float32(packed_NB[n, j]) * scale


@compiled
def fill4(packed_NB, scales_NC, out_NPK, group):
    width = group // 2
    for n in range(packed_NB.shape[0]):
        for c in range(scales_NC.shape[1]):
            scale, start = scales_NC[n, c], c * width
            for i in range(width):
                j = start + i
                byte = packed_NB[n, j]
                out_NPK[n, 0, j] = float32(byte & 15) * scale
                out_NPK[n, 1, j] = float32(byte >> 4) * scale


@compiled
def fill3(packed_NB, scales_NC, out_NPK, group):
    width = group // 8
    for n in range(packed_NB.shape[0]):
        for c in range(scales_NC.shape[1]):
            scale, start = scales_NC[n, c], c * width
            for i in range(width):
                j = start + i
                low, middle, high = packed_NB[n, 3 * j], packed_NB[n, 3 * j + 1], packed_NB[n, 3 * j + 2]
                word = int32(low) | (int32(middle) << 8) | (int32(high) << 16)
                for p in range(8):
                    out_NPK[n, p, j] = float32((word >> (3 * p)) & 7) * scale


@compiled
def fill2(packed_NB, scales_NC, out_NPK, group):
    width = group // 4
    for n in range(packed_NB.shape[0]):
        for c in range(scales_NC.shape[1]):
            scale, start = scales_NC[n, c], c * width
            for i in range(width):
                j = start + i
                byte = packed_NB[n, j]
                out_NPK[n, 0, j] = float32(byte & 3) * scale
                out_NPK[n, 1, j] = float32((byte >> 2) & 3) * scale
                out_NPK[n, 2, j] = float32((byte >> 4) & 3) * scale
                out_NPK[n, 3, j] = float32(byte >> 6) * scale


@compiled
def gemv8(packed_NB, scales_NC, x_PK, out_N, group):
    for n in range(packed_NB.shape[0]):
        total = float32(0)
        for c in range(scales_NC.shape[1]):
            part, start = float32(0), c * group
            for i in range(group):
                j = start + i
                part += float32(packed_NB[n, j]) * x_PK[0, j]
            total += part * scales_NC[n, c]
        out_N[n] += total


@compiled
def gemv4(packed_NB, scales_NC, x_PK, out_N, group):
    width = group // 2
    for n in range(packed_NB.shape[0]):
        total = float32(0)
        for c in range(scales_NC.shape[1]):
            part, start = float32(0), c * width
            for i in range(width):
                j = start + i
                byte = packed_NB[n, j]
                part += float32(byte & 15) * x_PK[0, j] + float32(byte >> 4) * x_PK[1, j]
            total += part * scales_NC[n, c]
        out_N[n] += total


@compiled
def gemv2(packed_NB, scales_NC, x_PK, out_N, group):
    width = group // 4
    for n in range(packed_NB.shape[0]):
        total = float32(0)
        for c in range(scales_NC.shape[1]):
            part, start = float32(0), c * width
            for i in range(width):
                j = start + i
                byte = packed_NB[n, j]
                part += float32(byte & 3) * x_PK[0, j] + float32((byte >> 2) & 3) * x_PK[1, j]
                part += float32((byte >> 4) & 3) * x_PK[2, j] + float32(byte >> 6) * x_PK[3, j]
            total += part * scales_NC[n, c]
        out_N[n] += total


FILL = {8: fill8, 4: fill4, 3: fill3, 2: fill2}
GEMV = {8: gemv8, 4: gemv4, 2: gemv2}
