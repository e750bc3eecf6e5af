"""What routed tokens cost under a placement: rows computed, copies sent between devices. One evaluator for all placers.

Two dataflows are told apart, and every figure says which it counts:

- "home": plain expert parallelism. A token lives on one device (its sequence's number modulo P); in every layer one
  copy goes to each other device that keeps any of its experts, and one partial sum comes back from each.
- "follow": the token moves on. After a layer it lives where its heaviest expert was, and partial sums meet there
  (context-coherent expert parallelism: every device must then hold every sequence's context, which is not counted).

Shapes by suffix: T tokens, L layers, K slots, E experts, P devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from moekit.errors import PlanError, ProfileError

if TYPE_CHECKING:
    from moekit.parallel.placement import Placement
    from moekit.profile import Profile, RoutingTrace

Dataflow = Literal["home", "follow"]


@dataclass(frozen=True, eq=False)
class Flow:
    """What placers choose by: ``counts`` [L, E] (token, slot) pairs of each expert, ``pairs`` [L-1, E, E] how often a
    token that used i in a layer used j in the next (every ordered pair of a token's slots counts 1)."""

    counts: np.ndarray
    pairs: np.ndarray

    @property
    def num_layers(self) -> int:
        return self.counts.shape[0]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[1]

    @classmethod
    def of_trace(cls, trace: RoutingTrace) -> Flow:
        """Raises PlanError where the layers differ in their number of experts."""
        experts = _same(trace.num_experts)
        ids = [np.where(layer >= 0, layer, experts) for layer in trace.expert.transpose(1, 0, 2)]
        counts = np.stack([np.bincount(layer.ravel(), minlength=experts + 1)[:experts] for layer in ids])
        pairs = np.zeros((len(ids) - 1, experts, experts))
        for table, (before, after) in zip(pairs, pairwise(ids), strict=True):
            both = (before[:, :, None] * (experts + 1) + after[:, None, :]).ravel()
            found = np.bincount(both, minlength=(experts + 1) ** 2).reshape(experts + 1, experts + 1)
            table[:] = found[:experts, :experts]
        return cls(counts.astype(float), pairs)

    @classmethod
    def of_profile(cls, profile: Profile) -> Flow:
        """From the sums over all text observed; where pairs were not counted, from the profile's trace.

        Raises:
            ProfileError: the profile has neither; the message says what to do.
            PlanError: the layers differ in their number of experts.
        """
        layers = list(profile.layers.values())
        _same(tuple(layer.num_experts for layer in layers))
        if all("transition" in layer.arrays for layer in layers[1:]):
            pairs = [layer.array("transition") for layer in layers[1:]]
            counts = np.stack([layer.total("counts") for layer in layers])
            return cls(counts, np.stack(pairs) if pairs else np.zeros((0, *counts.shape[1:], counts.shape[1])))
        trace = traced(profile)
        if trace is None:
            raise ProfileError(
                "the profile has neither pair counts ('transition') nor a trace: run `moekit profile` again with "
                "the default statistics, or give --text so that routing is recorded now"
            )
        return cls.of_trace(trace)

    @cached_property
    def total(self) -> float:
        """Pairs in all."""
        return float(self.pairs.sum())

    def crossing(self, device: np.ndarray) -> float:
        """Share of the pairs whose two experts lie on different devices ([L, E]): what affinity placement minimises."""
        apart = sum(
            float(table[before[:, None] != after[None]].sum())
            for table, (before, after) in zip(self.pairs, pairwise(device), strict=True)
        )
        return apart / self.total if self.total else 0.0

    def rows(self, device: np.ndarray, devices: int) -> np.ndarray:
        """[L, P] (token, slot) pairs that each device computes."""
        both = zip(device, self.counts, strict=True)
        return np.stack([np.bincount(row, counts, devices) for row, counts in both])


def traced(profile: Profile) -> RoutingTrace | None:
    """The trace that a profile holds, or None."""
    from moekit.profile import RoutingTrace

    layers = profile.layers.values()
    whole = len(profile.trace) and all({"trace_expert", "trace_weight"} <= set(layer.arrays) for layer in layers)
    return RoutingTrace.of_profile(profile) if whole else None


def _same(num_experts: tuple[int, ...]) -> int:
    if len(set(num_experts)) != 1:
        raise PlanError(
            f"layers keep from {min(num_experts)} to {max(num_experts)} experts: only layers of one size are placed"
        )
    return num_experts[0]


def imbalance(rows: np.ndarray) -> float:
    """Busiest device over the mean device, [L, P], mean over layers: 1 is even, P is all on one."""
    return float((rows.max(1) / np.maximum(rows.mean(1), 1e-30)).mean())


@dataclass(frozen=True, eq=False)
class Movement:
    """Of the tokens of a trace: ``rows`` [L, P] (token, slot) pairs computed, ``sent`` [L, P, P] copies of a token's
    hidden state (there, or a partial sum on its way) from device to device; the diagonal is 0."""

    dataflow: Dataflow
    tokens: int
    rows: np.ndarray
    sent: np.ndarray
    node: np.ndarray
    """[P] the node of each device."""

    @property
    def copies(self) -> float:
        """Copies between devices, per token and layer."""
        return float(self.sent.sum()) / self._calls

    @property
    def across(self) -> float:
        """Copies between nodes, per token and layer."""
        return float(self.sent[:, self.node[:, None] != self.node[None]].sum()) / self._calls

    @property
    def imbalance(self) -> float:
        return imbalance(self.rows)

    @property
    def busiest_link(self) -> float:
        """Copies on the busiest link of each layer, mean over layers, per token."""
        return float(self.sent.max((1, 2)).mean()) / max(self.tokens, 1)

    @property
    def _calls(self) -> int:
        return max(self.tokens * len(self.rows), 1)


def movement(placement: Placement, trace: RoutingTrace, dataflow: Dataflow) -> Movement:
    """Count what a trace's tokens would move and compute. Raises PlanError for a trace of another shape."""
    if trace.num_layers != placement.num_layers or _same(trace.num_experts) != placement.num_experts:
        raise PlanError(
            f"the placement is for {placement.num_layers} layers of {placement.num_experts} experts, the trace has "
            f"{trace.num_layers} of {max(trace.num_experts)}"
        )
    devices = placement.devices
    at = home = trace.sequence % devices
    rows, sent = np.zeros((trace.num_layers, devices)), np.zeros((trace.num_layers, devices, devices))
    for layer in range(trace.num_layers):
        ids, weight = trace.expert[:, layer], trace.weight[:, layer]
        keeps = np.append(placement.device[layer], devices)  # an unused slot (-1) is on no device
        where = keeps[ids]
        rows[layer] = np.bincount(where.ravel(), minlength=devices + 1)[:devices]
        present = (where[:, :, None] == np.arange(devices)).any(1)
        before = at
        if dataflow == "follow":
            heaviest = np.where(ids >= 0, weight, -np.inf).argmax(1)
            found = where[np.arange(len(ids)), heaviest]
            at = np.where(found < devices, found, before)
        else:
            before = at = home
        for device in range(devices):
            sent[layer, device] += present[before == device].sum(0)  # there
            sent[layer, :, device] += present[at == device].sum(0)  # partial sums
        np.fill_diagonal(sent[layer], 0)
    return Movement(dataflow, len(trace), rows, sent, np.arange(devices) // placement.grid.per_node)
