"""Predictors: which experts the next layers will want, ranked, from what is known at one layer.

Shapes by suffix: T tokens of a batch, H hidden size, E experts.
"""
# ruff: noqa: N815, B027 (shape suffixes in the names of fields; hooks that need not be filled)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from moekit.errors import OptionError
from moekit.plan.options import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.profile import RoutingTrace

Ranked = list[tuple[int, float]]
"""(expert, score), the likeliest first. Scores compare within one list."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Signal:
    """What is known when a batch of tokens stands before the experts of one layer.

    ``x_TH`` is what this layer's router read; ``token`` [T] are ids; ``routing`` maps the layers already passed in this
    forward call, this one included, to the chosen experts int [T, K] (-1 where a slot is unused); ``sequence`` [T] says
    which request each token belongs to. ``token`` and ``sequence`` leave padding out. Anything but ``routing`` may be
    None: a predictor that needs what is missing predicts nothing.
    """

    x_TH: Tensor | None = None
    token: np.ndarray | None = None
    routing: Mapping[int, np.ndarray] = field(default_factory=dict)
    sequence: np.ndarray | None = None


class Predictor(ABC):
    """No I/O and no clock. Layers are counted from 0 over the layers that have experts."""

    def reset(self) -> None:
        """A new sequence or request begins."""

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """What a batch really needed at ``layer``, told once it is known."""

    @abstractmethod
    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        """One ranking for each of the layers ``layer + 1`` to ``layer + horizon``, as far as there are layers.

        An empty ranking says that nothing is known. ``layer`` -1 asks before the first layer is reached.
        """


PREDICTORS = ("next-gate", "pre-gate", "path", "token-table", "frequency", "previous-token")
"""Names that :func:`predictor` knows."""


def predictor(name: str, *, model: PreTrainedModel | None = None, seen: RoutingTrace | None = None) -> Predictor:
    """A predictor by name. ``next-gate`` needs the live model, ``pre-gate``, ``path`` and ``token-table`` a trace to
    learn from (with router inputs, or with token ids); ``frequency`` takes one as its prior.

    Raises:
        OptionError: the name is unknown (the nearest is named), or what it needs is not given.
        ProfileError: the trace lacks what it is to be learned from.
    """
    from moekit.run import _predictors_gate, _predictors_path, _predictors_seen

    if name not in PREDICTORS:
        raise OptionError(f"unknown predictor '{name}'; {nearest(name, PREDICTORS)}")
    if name == "next-gate":
        if model is None:
            raise OptionError("next-gate asks the model's own routers: give the model")
        return _predictors_gate.NextGate.of_model(model)
    if seen is None:
        raise OptionError(f"{name} is learned from a routing trace: record one first")
    if name == "pre-gate":
        return _predictors_gate.NextGate(_predictors_gate.fit_gates(seen))
    if name == "path":
        return _predictors_path.PathPredictor(_predictors_path.train_path(seen), seen.num_experts)
    if name == "token-table":
        return _predictors_seen.TokenTable(seen)
    if name == "frequency":
        return _predictors_seen.Frequency.of_trace(seen)
    return _predictors_seen.PreviousToken(seen.num_layers)


def ranked(order_E: np.ndarray, score_E: np.ndarray) -> Ranked:
    """Experts by falling ``order_E`` [E], ties to the lower id, each with its ``score_E``."""
    return [(int(expert), float(score_E[expert])) for expert in np.argsort(-order_E, kind="stable")]
