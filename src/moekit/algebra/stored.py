"""From what rounding gives to what the bank formats take, expert by expert, without rounding again.

Low-rank and shared factors need no such step: their tensors are those of `formats.Factors` and `formats.LatentBank`.
"""

from __future__ import annotations

from moekit.algebra.grids import Rounded
from moekit.algebra.planes import Planes
from moekit.formats import Codes, Plane, Ternary


def as_codes(rounded: Rounded, expert: int) -> Codes:
    """One expert of weights [E, R, C] on an asymmetric or symmetric grid, for `PackedBank.from_codes`."""
    return Codes(rounded.codes[expert], rounded.parameters["scales"][expert], rounded.parameters["mins"][expert])


def as_ternary(rounded: Rounded, expert: int) -> Ternary:
    """One expert of weights [E, R, C] on a ternary grid of whole rows, for `TernaryBank.from_symbols`."""
    low, high = (rounded.parameters[name][expert, :, 0] for name in ("low", "high"))
    return Ternary(rounded.codes[expert].char() - 1, low, high)


def as_planes(planes: Planes, expert: int) -> tuple[Codes, list[Plane]]:
    """One expert of nested weights [E, R, C], for `NestedBank.from_planes`."""
    signs = [Plane(plane.codes[expert], -plane.parameters["mins"][expert]) for plane in planes.signs]
    return as_codes(planes.base, expert), signs
