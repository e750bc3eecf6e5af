"""Placements: which device keeps which expert of which layer. What solvers return, evaluators judge, servers read.

Parts: `_traffic` (what routed tokens cost under a placement), `_solver*` (exact, bounded and heuristic optimisers of
one objective each), `_placement_file` and `_placement_export` (on disk). Shapes by suffix: L MoE layers, E experts,
P devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moekit.errors import OptionError, PlanError
from moekit.parallel._links import Grid
from moekit.parallel._traffic import Flow
from moekit.parallel.dispatch import Layout
from moekit.plan import options as specification

BASELINES = ("contiguous", "random", "balanced")
"""Placements that are no paper's: what everything else is held against."""


@dataclass(frozen=True, eq=False)
class Placement:
    """``device`` int [L, E] is the device of every expert; devices 0 to P - 1 lie on ``grid``'s nodes in order.

    Raises PlanError for a device that there is not, or one that keeps nothing at all.
    """

    device: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        device = np.asarray(self.device)
        if device.ndim != 2 or not device.size:
            raise PlanError(f"a placement is a table of layers by experts, found the shape {device.shape}")
        wrong = device[(device < 0) | (device >= self.devices)]
        if len(wrong):
            raise PlanError(
                f"a placement on {self.devices} devices names device {wrong[0]}: 0 to {self.devices - 1} are"
            )
        idle = self.devices - len(np.unique(device))
        if idle:
            raise PlanError(f"{idle} of {self.devices} devices keep no expert at all: place on fewer")

    @property
    def devices(self) -> int:
        return self.grid.world

    @property
    def num_layers(self) -> int:
        return self.device.shape[0]

    @property
    def num_experts(self) -> int:
        return self.device.shape[1]

    @cached_property
    def node(self) -> np.ndarray:
        """[L, E] the node of every expert."""
        return self.device // self.grid.per_node

    @cached_property
    def sizes(self) -> np.ndarray:
        """[L, P] experts that each device keeps."""
        return np.stack([np.bincount(row, minlength=self.devices) for row in self.device])

    @property
    def even(self) -> bool:
        """Whether every device keeps the same number of experts in every layer, as most servers require."""
        return bool((self.sizes == self.sizes[0, 0]).all())

    def experts(self, layer: int, device: int) -> list[int]:
        return np.flatnonzero(self.device[layer] == device).tolist()

    def layout(self, layer: int) -> Layout:
        """One layer as the engine takes it."""
        return Layout(self.devices, tuple(self.device[layer].tolist()))


@dataclass(frozen=True)
class Placed:
    """A placement and what its maker knows of it: by objective, the value reached and a proven lower bound of it."""

    placement: Placement
    how: str
    value: Mapping[str, float] = field(default_factory=dict)
    bound: Mapping[str, float] = field(default_factory=dict)

    def gap(self, objective: str) -> float:
        """Share of the value that may be above the optimum: (value - bound) / value; 0 where both are 0."""
        value, bound = self.value[objective], self.bound[objective]
        return (value - bound) / value if value > 0 else 0.0


class Placer(ABC):
    """A way of placing experts by what was observed. Its frozen dataclass is its configuration."""

    @abstractmethod
    def place(self, flow: Flow, grid: Grid) -> Placed:
        """Place the experts that ``flow`` describes on a grid of devices; deterministic."""


def placers() -> tuple[str, ...]:
    """The names of all placers: the baselines, then the papers of this room that place experts."""
    found = []
    for name in specification.names(str(__package__)):
        try:
            specification.class_of(str(__package__), Placer, "placer", name)  # type: ignore[type-abstract]
        except AssertionError:
            continue
        found.append(name)
    return (*BASELINES, *found)


def placer(spec: str) -> Placer:
    """The placer that ``name`` or ``name:key=value`` is; OptionError names the nearest valid choice."""
    from moekit.parallel._solver_greedy import Baseline

    name, _, options = spec.partition(":")
    name = name.strip()
    if name in BASELINES:
        return Baseline(kind=name, **specification.values_of(name, Baseline, options))
    if name not in placers():
        raise OptionError(f"unknown placer '{name}'; {specification.nearest(name, placers())}")
    kind = specification.class_of(str(__package__), Placer, "placer", name)  # type: ignore[type-abstract]
    return kind(**specification.values_of(name, kind, options))


def check_grid(num_experts: int, devices: int, nodes: int = 1) -> Grid:
    """The grid of devices. OptionError where nodes do not divide devices, or devices the experts of a layer."""
    if devices < 1 or nodes < 1 or devices % nodes:
        raise OptionError(f"{devices} devices do not divide over {nodes} nodes: choose nodes that divide them")
    if num_experts % devices:
        fits = [p for p in range(nodes, num_experts + 1, nodes) if num_experts % p == 0]
        raise OptionError(
            f"{num_experts} experts per layer do not divide over {devices} devices: choose "
            + (f"one of {', '.join(map(str, fits))}" if fits else f"fewer nodes than {nodes}")
        )
    return Grid.of(devices, nodes)
