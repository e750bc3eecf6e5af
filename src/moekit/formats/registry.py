"""Every stored format by the name its ``describe()`` gives, and what all of them share.

A stored format is a frozen dataclass on ``stored`` (its tensors by name on disk) with ``allocate`` and ``describe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation, ExpertBank
from ..errors import OptionError
from ._stored import StoredBank
from .latent import LatentBank
from .lowrank import LowRankBank
from .nested import NestedBank
from .packed import PackedBank
from .ternary import TernaryBank

FORMATS: dict[str, type[StoredBank]] = {
    kind.FORMAT: kind for kind in (PackedBank, LowRankBank, LatentBank, TernaryBank, NestedBank)
}
"""Class of each stored format; a description without a format is of packed integers."""


def allocate(
    describe: Mapping[str, Any],
    hidden_size: int,
    intermediate_size: int,
    activation: Activation = SILU_MUL,
    device: torch.device | str | None = None,
) -> Any:
    """An uninitialised bank with exactly the tensors that ``describe`` says; also on meta.

    Raises:
        OptionError: a format that this moekit does not know, or a description its format cannot be.
    """
    kind = describe.get("format", "packed")
    if kind not in FORMATS:
        raise OptionError(
            f"experts are stored in a format '{kind}' that this moekit does not know (it knows {', '.join(FORMATS)}): "
            "update moekit"
        )
    return FORMATS[kind].allocate(describe, hidden_size, intermediate_size, activation, device)


def with_tensors(bank: Any, tensors: Mapping[str, Tensor]) -> ExpertBank:
    """The same bank on other tensors of the same names."""
    return replace(bank, stored=dict(tensors))
