"""How much attention rests on the first token, and how large activations grow: what super experts are there for.

Shapes by suffix: L layers, B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moekit.errors import TextError
from moekit.plan.live import batches

if TYPE_CHECKING:
    from moekit.stream import LoadedModel


class Sinks(NamedTuple):
    """``mass`` [L]: mean attention of later tokens on the first, over heads; ``massive`` [L]: largest absolute value of
    the residual stream entering each layer. Layers without attention weights are left out of ``mass``."""

    mass: np.ndarray
    massive: np.ndarray

    def decay(self, after: Sinks) -> float:
        """Share of the mean mass that is gone in ``after`` (the paper's sink decay rate): 0 none, 1 all."""
        before = float(self.mass.mean())
        return 1.0 - float(after.mass.mean()) / before if before > 0 else 0.0


@torch.no_grad()
def sinks(runner: LoadedModel, sequences: Sequence[np.ndarray]) -> Sinks:
    """Of token sequences, each begun at its first token. The attention that shows its weights runs meanwhile.

    Raises TextError for sequences of fewer than two tokens.
    """
    model, asked = runner.model, list(batches(sequences, 4))
    if not asked:
        raise TextError("attention sinks need sequences of two tokens or more, got none")
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    masses, peaks, weights = [], [], []
    try:
        for ids in asked:
            out = model(
                input_ids=ids.to(runner.device), output_attentions=True, output_hidden_states=True, use_cache=False
            )
            shown = [a for a in out.attentions or () if a is not None]
            masses.append([float(a[:, :, 1:, 0].mean()) for a in shown])
            # The last of the states has passed the final norm.
            peaks.append([float(h.abs().max()) for h in out.hidden_states[:-1]])
            weights.append(ids.shape[0] * (ids.shape[1] - 1))
    finally:
        model.set_attn_implementation(usual)
    return Sinks(np.average(np.array(masses), axis=0, weights=weights), np.array(peaks).max(axis=0))
