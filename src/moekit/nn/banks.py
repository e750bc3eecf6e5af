"""The kinds of banks that can hold the stacked experts of a layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .experts import Experts
from .modulated import ModulatedExperts
from .powers import PowerExperts
from .spawn import Spawning
from .subspace import SubspaceExperts

BANKS: dict[str, Callable[..., nn.Module]] = {
    "stacked": Experts,
    "spawning": Spawning,
    "power-of-two": PowerExperts,
    "subspace": SubspaceExperts,
    "modulated": ModulatedExperts,
}
"""By the name a configuration gives; built with (config, site), called with (x [T, H], ids [T, K], weights [T, K])."""
