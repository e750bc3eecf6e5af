"""What any policy can be told beside its own options: experts that go last, and each layer's share of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moekit.errors import OptionError
from moekit.profile import Profile
from moekit.run._policies_known import Pinned
from moekit.run._policies_pools import LayerPools
from moekit.run.policy import CachePolicy, Key


@dataclass(kw_only=True)
class Around:
    """``pinned``: a profile whose ``hot`` most chosen experts (a share of all, or a number) go last; ``quotas``: what
    each layer is due, relative to the others, the last one for all further layers (``4+2+1``)."""

    pinned: str = ""
    hot: float | int = 0.1
    quotas: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hot <= 0 or (isinstance(self.hot, float) and self.hot > 1):
            raise OptionError(f"hot={self.hot}: give a share of all experts above 0 and at most 1, or a number of them")
        if any(weight < 0 for weight in self.weights) or (self.quotas and not any(self.weights)):
            raise OptionError(f"quotas={'+'.join(self.quotas)}: none may be below 0, and not all of them 0")

    @property
    def weights(self) -> tuple[float, ...]:
        try:
            return tuple(map(float, self.quotas))
        except ValueError:
            raise OptionError(f"quotas={'+'.join(self.quotas)} are not numbers, such as 4+2+1") from None

    def put(self, inner: CachePolicy, by_layer: bool, source: str | None) -> CachePolicy:
        """``inner`` with what is asked for around it; ``by_layer`` where layers keep to their shares anyway.

        Raises:
            ProfileError: no profile, or one of a model with another fingerprint than ``source``.
        """
        if self.quotas or by_layer:
            inner = LayerPools(inner, self.weights or None)
        return Pinned(inner, self._hottest(source)) if self.pinned else inner

    def _hottest(self, source: str | None) -> list[Key]:
        """By how many tokens choose them, ties to the lower key."""
        profile = Profile.load(self.pinned)
        if source is not None:
            profile.check_source(source)
        counts = [layer.total("counts") for layer in profile.layers.values()]
        keys = [(layer, expert) for layer, count_E in enumerate(counts) for expert in range(len(count_E))]
        number = round(self.hot * len(keys)) if isinstance(self.hot, float) else self.hot
        return [keys[at] for at in np.argsort(-np.concatenate(counts), kind="stable")[:number]]
