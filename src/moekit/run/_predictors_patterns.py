"""Which stored task a prompt is of, told by how the first layer routes it; that task's experts are read and stay.

PreMoe's retrieval (arXiv 2505.17639) at run time: nothing is pruned, so tokens are those of the whole model; a wrong
task costs time only. Shapes by suffix: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moekit.run._policies_known import Pinned
from moekit.run._predictors_gate import Gate
from moekit.run.answer import fitting
from moekit.run.paging import paging
from moekit.run.predict import Predictor, Ranked, Signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SHARE = 0.75
"""Of the experts that fit: how many the pattern may hold. The rest is for what a prompt needs beside it."""


def keep_patterns(
    model: PreTrainedModel, keys: Mapping[str, np.ndarray], ordered: Mapping[str, Mapping[str, Sequence[int]]]
) -> Retrieval:
    """From now on the experts of each sequence's task are read first and go last; what else pages the model stays.

    ``keys`` [E] by task; ``ordered`` by task and by name of the MoE block its experts, the most needed first.
    """
    served = paging(model)
    each = max(int(SHARE * fitting(served) / len(served.blocks)), 1)
    experts = {task: [own.get(block.name, ())[:each] for block in served.blocks] for task, own in ordered.items()}
    pins = Pinned(served.store.policy, ())
    served.store.clear(pins)
    found = Retrieval(served.blocks[0].choose, keys, experts, pins, served.predictor, served.width)
    served.predictor, served.width = found, max(served.width, each)
    return found


class Retrieval(Predictor):
    """Finds a sequence's task once, from its first tokens at layer 0, and tells ``pins`` which experts go last.

    ``gate`` is the first layer's router, ``keys`` [E] by task what its marker is held against (L2), ``experts`` by task
    those of each layer, the most needed first. The task's experts of all later layers are predicted once, when it is
    found; otherwise predictions are the first ``width`` of ``inner``'s. ``task`` is the present sequence's.
    """

    def __init__(
        self,
        gate: Gate,
        keys: Mapping[str, np.ndarray],
        experts: Mapping[str, Sequence[Sequence[int]]],
        pins: Pinned,
        inner: Predictor | None = None,
        width: int = 0,
    ) -> None:
        self.gate, self.keys, self.experts = gate, keys, experts
        self.pins, self.inner, self.width = pins, inner, width
        self.task: str | None = None

    def reset(self) -> None:
        self.task = None
        if self.inner is not None:
            self.inner.reset()

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        if self.inner is not None:
            self.inner.observe(layer, experts)

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        if layer == 0 and self.task is None and signal.x_TH is not None:
            return self._retrieve(signal.x_TH)
        if self.inner is None:
            return []
        return [ranking[: self.width] for ranking in self.inner.predict(layer, signal, horizon)]

    def _retrieve(self, x_TH: Tensor) -> list[Ranked]:
        marker_E = winners(self.gate, x_TH)
        self.task = min(self.keys, key=lambda task: float(np.linalg.norm(self.keys[task] - marker_E)))
        layers = self.experts[self.task]
        self.pins.hot = frozenset((layer, expert) for layer, own in enumerate(layers) for expert in own)
        return [[(expert, 1.0) for expert in own] for own in layers[1:]]


@torch.no_grad()
def winners(gate: Gate, x_TH: Tensor) -> np.ndarray:
    """[E]: mean over tokens of an expert's router logit where it is the largest, else 0 (a query's marker)."""
    logits_TE = gate(x_TH).logits
    assert logits_TE is not None
    top_T, expert_T = logits_TE.double().max(1)
    total_E = np.zeros(logits_TE.shape[1])
    np.add.at(total_E, expert_T.cpu().numpy(), top_T.cpu().numpy())
    return total_E / len(x_TH)
