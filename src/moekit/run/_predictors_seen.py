"""Predictors that only remember: how often experts were used, by the last token or by this token, or all that will be.

Shapes by suffix: T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moekit.errors import ProfileError
from moekit.profile import RoutingTrace
from moekit.profile.trace import Request
from moekit.run._policies_known import demand
from moekit.run.predict import Predictor, Ranked, Signal, ranked


class Frequency(Predictor):
    """Experts by how often they were asked for: in ``prior`` [L, E] (shares of steps) and since then.

    The prior counts as ``weight`` steps. What is seen is kept over sequences.
    """

    def __init__(self, num_experts: Sequence[int], prior: np.ndarray | None = None, weight: float = 64.0) -> None:
        self.counts = [np.zeros(count) for count in num_experts]
        if prior is not None:
            self.counts = [weight * prior[layer, :count] for layer, count in enumerate(num_experts)]

    @classmethod
    def of_trace(cls, trace: RoutingTrace) -> Frequency:
        """With the demand of a trace as prior."""
        return cls(trace.num_experts, demand(trace))

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self.counts[layer][list(experts)] += 1

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        coming = self.counts[layer + 1 : layer + 1 + horizon]
        return [ranked(count_E, count_E / max(count_E.sum(), 1)) if count_E.any() else [] for count_E in coming]


class PreviousToken(Predictor):
    """The experts of the step before, in the order in which they were told; nothing at the start of a sequence."""

    def __init__(self, num_layers: int) -> None:
        self.last: list[Sequence[int]] = [()] * num_layers

    def reset(self) -> None:
        self.last = [()] * len(self.last)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self.last[layer] = tuple(experts)

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        return [[(expert, 1.0) for expert in last] for last in self.last[layer + 1 : layer + 1 + horizon]]


class TokenTable(Predictor):
    """How often each expert went with a token id in a trace, smoothed by ``weight`` steps of the experts' mean.

    Raises:
        ProfileError: the trace was recorded without token ids.
    """

    def __init__(self, trace: RoutingTrace, weight: float = 1.0) -> None:
        if trace.token is None:
            raise ProfileError("the trace has no token ids: record it from a live model")
        self.num_experts = trace.num_experts
        used_TLE = usage(trace)
        self.mean_LE = used_TLE.mean(0)
        self.table: Mapping[int, np.ndarray] = {
            int(token): (used_TLE[own].sum(0) + weight * self.mean_LE) / (own.sum() + weight)
            for token in np.unique(trace.token)
            for own in [trace.token == token]
        }

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        coming = range(layer + 1, min(layer + 1 + horizon, len(self.num_experts)))
        if signal.token is None:
            return [[] for _ in coming]
        share_LE = np.mean([self.table.get(int(token), self.mean_LE) for token in signal.token], axis=0)
        return [ranked(share_LE[later], share_LE[later])[: self.num_experts[later]] for later in coming]


class Oracle(Predictor):
    """What the requests will be; the bound of predictors. Each must be told by observe."""

    def __init__(self, future: Sequence[Request], num_layers: int) -> None:
        self.future, self.num_layers, self._at = future, num_layers, 0

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._at += 1

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        coming = self.future[self._at : self._at + min(horizon, self.num_layers - 1 - layer)]
        return [
            [(e, float(n)) for n, e in sorted(zip(r.counts, r.experts, strict=True), key=lambda p: (-p[0], p[1]))]
            for r in coming
        ]


def usage(trace: RoutingTrace) -> np.ndarray:
    """Float32 [T, L, E]: 1 where a token used an expert."""
    used_TLE = np.zeros((len(trace), trace.num_layers, max(trace.num_experts) + 1), np.float32)
    np.put_along_axis(used_TLE, np.where(trace.expert < 0, used_TLE.shape[2] - 1, trace.expert), 1.0, axis=2)
    return used_TLE[:, :, :-1]
