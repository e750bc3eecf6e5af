"""Experts that read 8-bit activations while they train: rounded per token, gradients passed straight through.

Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moekit.errors import UnsupportedModelError
from moekit.train.experts import run_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moekit_int8_activations"
LEVELS = 127


def int8(x_TH: Tensor) -> Tensor:
    """round(127 x / m) * m / 127 with m = max|x| of each token; the gradient is that of the identity."""
    most = x_TH.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = (x_TH.detach() * LEVELS / most).round() * most / LEVELS
    return x_TH + (rounded - x_TH.detach())


def int8_experts(module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, H]: an experts module's own computation with the input of each of its products rounded by :func:`int8`."""
    if module.is_transposed or module.has_bias or not module.has_gate:
        raise UnsupportedModelError(
            f"{type(module).__name__} is transposed, biased or without a gate: 8-bit activations are not implemented "
            "for such experts"
        )
    gate_up, down = module.gate_up_proj, module.down_proj
    return run_experts(x_TH, index_TK, weight_TK, gate_up, down, module._apply_gate, rounded=int8)


@contextmanager
def int8_activations(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's experts read 8-bit activations while it lasts."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, int8_experts)
    before = model.config._experts_implementation
    model.set_experts_implementation(NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
