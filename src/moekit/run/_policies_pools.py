"""Where a policy may look for victims: within the share of the cache that each layer is due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from moekit.run.policy import CachePolicy, Key


class LayerPools(CachePolicy):
    """Every layer keeps to its share of the cache; inside a layer ``inner`` chooses.

    A layer that holds its share or more gives up one of its own. One that holds less takes from the layer that is
    furthest above its share, so unused room is never idle and shares fill up by themselves. A batch that pins all of
    its own layer's residents borrows in the same way. ``weights`` are relative shares, equal where None: by layer
    index, or a sequence whose last one holds for all further layers. The cache is taken to be as large as what is
    resident when a victim is asked for.
    """

    def __init__(self, inner: CachePolicy, weights: Mapping[int, float] | Sequence[float] | None = None) -> None:
        self.inner, self.weights = inner, weights
        self._layers: defaultdict[int, set[Key]] = defaultdict(set)

    def reset(self) -> None:
        self.inner.reset()

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self._layers[layer]  # a layer is due a share from its first request on
        self.inner.routed(layer, experts, scores)

    def admitted(self, key: Key) -> None:
        self._layers[key[0]].add(key)
        self.inner.admitted(key)

    def evicted(self, key: Key) -> None:
        self._layers[key[0]].discard(key)
        self.inner.evicted(key)

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        own = incoming[0]
        if self._layers[own] and len(self._layers[own]) >= self._share(own, len(resident)):
            found = self._within(own, resident, pinned, incoming)
            if found is not None:
                return found
        excess = {layer: len(keys) - self._share(layer, len(resident)) for layer, keys in self._layers.items() if keys}
        for layer in sorted(excess, key=lambda layer: (layer == own, -excess[layer], layer)):
            found = self._within(layer, resident, pinned, incoming)
            if found is not None:
                return found
        return None

    def _within(self, layer: int, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        """Only what the store says is resident: it may hold some back, such as experts still being read."""
        inside = self._layers[layer].intersection(resident)
        return self.inner.victim(inside, pinned, incoming) if inside else None

    def _share(self, layer: int, capacity: int) -> int:
        if self.weights is None:
            return capacity // len(self._layers)
        weights = self.weights
        if not isinstance(weights, Mapping):
            weights = {known: weights[min(known, len(weights) - 1)] for known in self._layers}
        return int(capacity * weights.get(layer, 0.0) / (sum(weights.values()) or 1.0) + 1e-9)
