"""Ternary codes and bit planes in one pass, compiled by Numba where it is installed.

Shapes by suffix: M rows of x, N output and K input columns of a product, Q codes, B packed bytes of a row, C groups of
a row. ``entries_D`` are those of the dictionary code; ``levels_N4`` holds 0, low, high, 0 of each row, so that what a
field of an entry adds needs no branch. U units of a row: 8 columns each.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache

from numba import njit
from numpy import empty, float32, int32, int64

from ..formats.numba_cache import KEEPS

NONE = float32(0)

compiled = njit(nogil=True, fastmath=True, cache=KEEPS)


@compiled
def ternary_fill(codes_Q, offsets_N, levels_N4, entries_D, out_NK):
    """Rows decoded; ``offsets_N`` has one entry more than ``out_NK`` has rows."""
    out_NK[:] = 0
    for n in range(out_NK.shape[0]):
        start = int64(0)
        for q in range(offsets_N[n], offsets_N[n + 1]):
            entry = int64(entries_D[codes_Q[q]])
            # fields without a weight come first and write a zero that the others may overwrite
            out_NK[n, start + (entry & 31)] = levels_N4[n, (entry >> 5) & 3]
            out_NK[n, start + ((entry >> 7) & 31)] = levels_N4[n, (entry >> 12) & 3]
            out_NK[n, start + ((entry >> 14) & 31)] = levels_N4[n, (entry >> 19) & 3]
            start += entry >> 21


@compiled
def ternary_row(codes_Q, offsets_N, levels_N4, entries_D, x_K, out_N):
    """W @ x for one row of x, by the weights that are not zero."""
    for n in range(out_N.shape[0]):
        total, start = float32(0), int64(0)
        for q in range(offsets_N[n], offsets_N[n + 1]):
            entry = int64(entries_D[codes_Q[q]])
            total += x_K[start + (entry & 31)] * levels_N4[n, (entry >> 5) & 3]
            total += x_K[start + ((entry >> 7) & 31)] * levels_N4[n, (entry >> 12) & 3]
            total += x_K[start + ((entry >> 14) & 31)] * levels_N4[n, (entry >> 19) & 3]
            start += entry >> 21
        out_N[n] = total


@compiled
def bits_row(packed_NB, scales_NC, mins_NC, x_8U, sums_C, out_N, width):
    """The ``row`` of :func:`level` for one bit: a masked addition takes half the time of a conversion and a product."""
    for n in range(out_N.shape[0]):
        for c in range(scales_NC.shape[1]):
            part, start = NONE, c * width
            for i in range(width):
                u = start + i
                word = int32(packed_NB[n, u])
                part += x_8U[0, u] if word & 1 else NONE
                part += x_8U[1, u] if word & 2 else NONE
                part += x_8U[2, u] if word & 4 else NONE
                part += x_8U[3, u] if word & 8 else NONE
                part += x_8U[4, u] if word & 16 else NONE
                part += x_8U[5, u] if word & 32 else NONE
                part += x_8U[6, u] if word & 64 else NONE
                part += x_8U[7, u] if word & 128 else NONE
            out_N[n] += part * scales_NC[n, c] + mins_NC[n, c] * sums_C[c]


@cache
def level(bits):
    """(add, row) for integers of ``bits``, in units of 8 columns of ``bits`` bytes.

    ``add``: out[n, p, u] += integer * scale + min of column 8 u + p. ``row``: out += (integer * scale + min) @ x for
    one row of x, columns in that order too, ``sums_C`` those of x over each group; ``width`` units a group. Scales are
    spread over a row first, or the loops are too short to be vectorised.
    """
    mask = int32(2**bits - 1)

    @compiled
    def words(packed_NB, n, word_U):
        for u in range(word_U.shape[0]):
            word = int32(packed_NB[n, bits * u])
            for b in range(1, bits):
                word |= int32(packed_NB[n, bits * u + b]) << int32(8 * b)
            word_U[u] = word

    @compiled
    def add(packed_NB, scales_NC, mins_NC, out_N8U, width):
        units = out_N8U.shape[2]
        word_U, scale_U, min_U = empty(units, int32), empty(units, float32), empty(units, float32)
        for n in range(out_N8U.shape[0]):
            words(packed_NB, n, word_U)
            for c in range(scales_NC.shape[1]):
                scale_U[c * width : (c + 1) * width] = scales_NC[n, c]
                min_U[c * width : (c + 1) * width] = mins_NC[n, c]
            for p in range(8):
                out_U = out_N8U[n, p]
                for u in range(units):
                    out_U[u] += float32(word_U[u] & mask) * scale_U[u] + min_U[u]
                    word_U[u] >>= bits

    @compiled
    def row(packed_NB, scales_NC, mins_NC, x_8U, sums_C, out_N, width):
        word_U = empty(x_8U.shape[1], int32)
        for n in range(out_N.shape[0]):
            words(packed_NB, n, word_U)
            for c in range(scales_NC.shape[1]):
                part, start = float32(0), c * width
                for i in range(width):
                    u = start + i
                    word = word_U[u]
                    part += float32(word & mask) * x_8U[0, u]
                    part += float32((word >> bits) & mask) * x_8U[1, u]
                    part += float32((word >> (2 * bits)) & mask) * x_8U[2, u]
                    part += float32((word >> (3 * bits)) & mask) * x_8U[3, u]
                    part += float32((word >> (4 * bits)) & mask) * x_8U[4, u]
                    part += float32((word >> (5 * bits)) & mask) * x_8U[5, u]
                    part += float32((word >> (6 * bits)) & mask) * x_8U[6, u]
                    part += float32((word >> (7 * bits)) & mask) * x_8U[7, u]
                out_N[n] += part * scales_NC[n, c] + mins_NC[n, c] * sums_C[c]

    return add, bits_row if bits == 1 else row
