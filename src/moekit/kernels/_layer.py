"""The dense weights of one layer as kernels read them, whichever way a family stores them.

Shapes by suffix: E experts, I intermediate size, H hidden size, G = 2I if gated else I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..bank import SILU_MUL, Activation
from ..errors import UnsupportedModelError
from ..formats import DenseBank


@dataclass(frozen=True, eq=False)
class Layer:
    """``gate_up`` [E, G, H] and ``down`` [E, H, I] as views of the parameters, in the row order the family stores.

    ``activation`` expects that row order. ``finish`` is what is applied to an expert's output before it is weighted
    (a post-expert norm), or None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    finish: Callable[[Tensor], Tensor] | None = None
    trainable_between: bool = False

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @classmethod
    def of_bank(cls, bank: DenseBank) -> Layer:
        return cls(bank.gate_up, bank.down, bank.gate_up_bias, bank.down_bias, bank.activation)

    @classmethod
    def of_module(cls, module: Any) -> Layer:
        """From an experts module that transformers' shared decorator made, read by its flags."""
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = getattr(module, up_name), module.down_proj
        if module.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        up_bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
        down_bias = module.down_proj_bias if module.has_bias else None
        finish = in_its_dtype(module.post_expert_norm) if module.has_post_expert_norm else None
        activation = activation_of(module)
        return cls(up, down, up_bias, down_bias, activation, finish, _trainable_between(module))


def is_decorated(module: nn.Module) -> bool:
    """Whether a module is an experts module of transformers' shared contract."""
    flags = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "num_experts", "_is_expert_parallel")
    return all(hasattr(module, flag) for flag in flags)


def check_decorated(module: nn.Module) -> None:
    if not is_decorated(module):
        raise UnsupportedModelError(
            f"{type(module).__name__} is no experts module of transformers' shared contract "
            "(stacked weights behind use_experts_implementation): moekit's kernels cannot run it"
        )


def activation_of(module: Any) -> Activation:
    """What a module does between its two products, in its own row order; :data:`SILU_MUL` where it is just that."""
    act = getattr(module, "act_fn", None)
    if not module.has_gate:
        return Activation(type(act).__name__, in_its_dtype(act), gated=False)
    default = type(module)._apply_gate.__name__ == "_default_apply_gate"
    if default and module.is_concatenated and _is_silu(act):
        return SILU_MUL
    return Activation(f"{type(module).__name__}._apply_gate", in_its_dtype(act, module._apply_gate))


def _is_silu(act: Any) -> bool:
    """Whether a module or function is SiLU, by any of the names transformers has for it."""
    from transformers.activations import SiLUActivation

    return act is F.silu or type(act) in (nn.SiLU, SiLUActivation)


def in_its_dtype(owner: Any, function: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """``function`` (or ``owner`` itself) called in the dtype of the owner's parameters, if it has any.

    Kernels may work in float32 between half-precision weights, which a norm with weights of its own cannot mix.
    """
    function = function or owner
    parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    if parameter is None:
        return function
    return lambda tensor: function(tensor.to(parameter.dtype)).to(tensor.dtype)


def _trainable_between(module: Any) -> bool:
    """Whether anything but the stacked weights has parameters (a norm, a learned activation)."""
    between = (getattr(module, name, None) for name in ("act_fn", "post_expert_norm"))
    return any(isinstance(m, nn.Module) and next(m.parameters(), None) is not None for m in between)
