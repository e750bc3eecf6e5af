"""Next gate on the current input: later layers' routers asked before their own inputs exist.

Shapes by suffix: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moekit.blocks import blocks
from moekit.contract import Routing
from moekit.errors import ProfileError
from moekit.profile import RoutingTrace
from moekit.run._predictors_seen import usage
from moekit.run.predict import Predictor, Ranked, Signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Gate = Callable[[Tensor], Routing]
"""Router input [T, H] -> routing with logits [T, E]."""


class NextGate(Predictor):
    """The router of layer l + i reads the router input of layer l, which the residual stream has barely changed.

    ``gates`` holds one per layer. ``scales`` [L][H], if given, are the weights of the norms before the routers: the
    input is then divided by its own layer's and multiplied by the later layer's, which is exactly the later layer's
    norm on the current residual stream (norm ``next``); without them the input is taken as it is (norm ``own``).

    What a token would choose comes before what it would not; scores are router probabilities, mean over the batch.
    """

    def __init__(self, gates: Sequence[Gate], scales: Sequence[Tensor] | None = None) -> None:
        self.gates, self.scales = gates, scales

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> NextGate:
        """With the live model's own routers, norm ``own``."""
        return cls([block.choose for block in blocks(model)])

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        coming = range(layer + 1, min(layer + horizon + 1, len(self.gates)))
        if signal.x_TH is None or layer < 0:
            return [[] for _ in coming]
        with torch.no_grad():
            return [rank_routing(self.gates[later](self._input(signal.x_TH, layer, later))) for later in coming]

    def _input(self, x_TH: Tensor, layer: int, later: int) -> Tensor:
        if self.scales is None:
            return x_TH
        own, next_ = self.scales[layer], self.scales[later]
        return x_TH * torch.where(own == 0, torch.zeros_like(own), next_ / own).to(x_TH.dtype)


def rank_routing(routing: Routing) -> Ranked:
    """A batch's experts: by how many tokens choose them, then by mean probability."""
    assert routing.logits is not None
    score_E = routing.logits.float().softmax(1).mean(0).cpu().numpy()
    count_E = routing.counts(len(score_E)).cpu().numpy()
    return [(int(expert), float(score_E[expert])) for expert in np.lexsort((-score_E, -count_E))]


def linear_gate(weight_EH: Tensor, top_k: int) -> Gate:
    """A gate that is one matrix, such as a trained pre-gate: logits are x W^T, chosen are the ``top_k`` largest."""

    def gate(x_TH: Tensor) -> Routing:
        logits = x_TH.to(weight_EH.dtype) @ weight_EH.T
        weight, expert = logits.softmax(1).topk(top_k)
        return Routing(expert, weight, logits)

    return gate


def fit_gates(trace: RoutingTrace, ahead: int = 1, ridge: float = 1e-2) -> list[Gate]:
    """Pre-gates by layer: ridge regression of a layer's choices on the router inputs ``ahead`` layers earlier.

    The first ``ahead`` entries, which nothing comes before, are fitted to their own inputs. ``ridge`` is relative to
    the mean square of the inputs.

    Raises:
        ProfileError: the trace was recorded without router inputs.
    """
    if trace.inputs is None:
        raise ProfileError("the trace has no router inputs: record it with inputs=True")
    used_TLE, found = usage(trace), list[Gate]()
    for layer in range(trace.num_layers):
        x_TH = trace.inputs[:, layer - ahead if layer >= ahead else layer].astype(np.float64)
        gram_HH = x_TH.T @ x_TH
        gram_HH[np.diag_indices_from(gram_HH)] += ridge * np.trace(gram_HH) / len(gram_HH)
        centred_TE = used_TLE[:, layer] - used_TLE[:, layer].mean(0)
        weight_EH = np.linalg.solve(gram_HH, x_TH.T @ centred_TE).T
        top_k = int((trace.expert[:, layer] >= 0).sum(1).max())
        found.append(linear_gate(torch.from_numpy(weight_EH).float(), top_k))
    return found
