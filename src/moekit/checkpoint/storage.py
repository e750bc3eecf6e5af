"""Tensors that belong together on disk: a plain weight, or a quantised one with its scales.

Published checkpoints store a quantised matrix as several tensors. Each such group is one :class:`Stored`, named as
the plain weight would be, so that everything else speaks of weights only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_COMPANIONS: tuple[tuple[str, str, str], ...] = (
    (r"\.weight_scale_inv", ".weight", "scale_inv"),
    (r"_scale_inv", "", "scale_inv"),
    (r"\.weight_packed", ".weight", "packed"),
    (r"\.weight_scale", ".weight", "scale"),
    (r"\.weight_shape", ".weight", "shape"),
    (r"\.weight_zero_point", ".weight", "zero_point"),
    (r"\.weight_g_idx", ".weight", "g_idx"),
    (r"\.weight_global_scale", ".weight", "global_scale"),
    (r"\.input_scale", ".weight", "input_scale"),
    (r"\.input_global_scale", ".weight", "input_global_scale"),
    (r"_blocks", "", "blocks"),
    (r"_scales", "", "scales"),
    (r"\.qweight", "", "qweight"),
    (r"\.scales", "", "qscales"),
    (r"\.mins", "", "qmins"),
)
"""Ending of a companion's name, what it stands for in the plain weight's name, and its role."""
_PATTERN = re.compile("|".join(f"(?P<r{i}>{ending}$)" for i, (ending, _, _) in enumerate(_COMPANIONS)))
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
        match = _PATTERN.search(name)
        if match is None:
            plain[name] = {"weight": name}
            continue
        _, replacement, role = _COMPANIONS[int(str(match.lastgroup)[1:])]
        companions.append((name[: match.start()] + replacement, role, name))
    carried = {base for base, role, _ in companions if role in _CARRIERS}
    for base, role, name in companions:
        if base in carried or base in plain:
            plain.setdefault(base, {})[role] = name
        else:
            plain[name] = {"weight": name}
    return {base: Stored(base, tensors) for base, tensors in plain.items()}
