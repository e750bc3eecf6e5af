"""From what rounding gives to what the bank formats take, a matrix [R, C] of one expert at a time, rounding nothing.

Low-rank and shared factors need no such step: their tensors are those of `formats.Factors` and `formats.LatentBank`.
"""

from __future__ import annotations

from moekit.algebra.grids import Rounded
from moekit.algebra.planes import Planes
from moekit.formats import Codes, Plane, Ternary


def as_codes(rounded: Rounded) -> Codes:
    """A matrix on an asymmetric or symmetric grid, for `PackedBank.from_codes`."""
    return Codes(rounded.codes, rounded.parameters["scales"], rounded.parameters["mins"])


def as_ternary(rounded: Rounded) -> Ternary:
    """A matrix on a ternary grid of whole rows, for `TernaryBank.from_symbols`."""
    return Ternary(rounded.codes.char() - 1, rounded.parameters["low"][:, 0], rounded.parameters["high"][:, 0])


def as_planes(planes: Planes) -> tuple[Codes, list[Plane]]:
    """A nested matrix, for `NestedBank.from_planes`."""
    return as_codes(planes.base), [Plane(plane.codes, -plane.parameters["mins"]) for plane in planes.signs]
