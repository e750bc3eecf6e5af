"""Tensors that belong together on disk: a plain weight, or a quantised one with its scales.

Published checkpoints store a quantised matrix as several tensors. Each such group is one :class:`Stored`, named as
the plain weight would be, so that everything else speaks of weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LEAVES = {
    "weight_scale_inv": ("weight", "scale_inv"),
    "scale": ("weight", "scale_inv"),
    "qscale_weight": ("weight", "scale_inv"),
    "activation_scale": ("weight", "input_scale"),
    "weight_packed": ("weight", "packed"),
    "weight_scale": ("weight", "scale"),
    "weight_shape": ("weight", "shape"),
    "weight_zero_point": ("weight", "zero_point"),
    "weight_g_idx": ("weight", "g_idx"),
    "weight_global_scale": ("weight", "global_scale"),
    "input_scale": ("weight", "input_scale"),
    "input_global_scale": ("weight", "input_global_scale"),
    "qweight": ("", "qweight"),
    "scales": ("", "qscales"),
    "mins": ("", "qmins"),
}
"""Last component of a companion's name: that of the plain weight's name ("" drops it), and the companion's role."""
_ENDINGS = {"_scale_inv": "scale_inv", "_blocks": "blocks", "_scales": "scales"}
"""Endings of companions of parameters that have no component of their own for them."""
_CARRIERS = {"packed", "blocks", "qweight"}
"""Roles that hold a weight by themselves; the others only accompany one."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight on disk: ``name`` as if it were plain, and its tensors by role ("weight" for a plain one)."""

    name: str
    tensors: Mapping[str, str]

    @property
    def carrier(self) -> str:
        """The role that holds the numbers."""
        return next(role for role in ("weight", "packed", "blocks", "qweight") if role in self.tensors)


def group(names: Iterable[str]) -> dict[str, Stored]:
    """Every tensor of a checkpoint, grouped; a companion whose weight is absent stands alone under its own name."""
    plain: dict[str, dict[str, str]] = {}
    companions: list[tuple[str, str, str]] = []
    for name in names:
        companion = _companion(name)
        if companion is None:
            plain[name] = {"weight": name}
        else:
            companions.append((*companion, name))
    carried = {base for base, role, _ in companions if role in _CARRIERS}
    for base, role, name in companions:
        if base in carried or base in plain:
            plain.setdefault(base, {})[role] = name
        else:
            plain[name] = {"weight": name}
    return {base: Stored(base, tensors) for base, tensors in plain.items()}


def _companion(name: str) -> tuple[str, str] | None:
    """(plain weight's name, role) if the name looks like a companion's."""
    owner, _, leaf = name.rpartition(".")
    if leaf in _LEAVES:
        replacement, role = _LEAVES[leaf]
        return (f"{owner}.{replacement}" if replacement else owner), role
    for ending, role in _ENDINGS.items():
        if leaf.endswith(ending):
            return name.removesuffix(ending), role
    return None
