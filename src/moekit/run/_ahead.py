"""Reading ahead while a model runs: what a predictor is told, and what is fetched for what it says.

Shapes by suffix: B sequences, S positions, T tokens, K slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moekit.run._tier import used
from moekit.run.predict import Signal

if TYPE_CHECKING:
    from moekit.run.paging import Paging


def begin(paging: Paging, ids_BS: Tensor, mask: Tensor | None, new: bool) -> None:
    """A forward call reads ``ids_BS``, of ``new`` sequences or of those before; ``mask`` is its attention mask."""
    if paging.predictor is None or not paging.width:
        return
    if new:
        paging.predictor.reset()
    rows, length = ids_BS.shape
    kept = np.ones(rows * length, bool)
    if mask is not None and mask.dim() == 2:
        kept = mask[:, -length:].reshape(-1).cpu().numpy().astype(bool)
    sequence = np.repeat(np.arange(rows), length)[kept]
    paging.signal = Signal(token=ids_BS.reshape(-1).cpu().numpy()[kept], sequence=sequence)
    _fetch(paging, -1)


def reached(paging: Paging, layer: int, x_TH: Tensor, index_TK: Tensor) -> None:
    """The call stands before the experts of a layer, whose router read ``x_TH``; ``index_TK`` are experts."""
    if paging.predictor is None or not paging.width:
        return
    known = paging.signal
    paging.signal = replace(known, x_TH=x_TH, routing={**known.routing, layer: index_TK.cpu().numpy()})
    paging.predictor.observe(layer, used(index_TK, paging.blocks[layer].num_experts))
    _fetch(paging, layer)


def _fetch(paging: Paging, layer: int) -> None:
    assert paging.predictor is not None
    ahead = paging.predictor.predict(layer, paging.signal, paging.horizon)
    for distance, ranked in enumerate(ahead, start=1):
        tier: Any = paging.store.layers[layer + distance]
        paging.store.prefetch(layer + distance, tier.foreseen([expert for expert, _ in ranked[: paging.width]]))
