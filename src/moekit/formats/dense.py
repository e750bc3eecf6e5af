"""The plain format: stacked floating-point weights, in canonical orientation.

Shapes by suffix: E experts, I intermediate size, H hidden size, G = 2I if gated else I, M experts of a recombination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation, ExpertBank, ExpertWeights
from ..errors import OptionError


@dataclass(frozen=True, eq=False)
class DenseBank(ExpertBank):
    """Stacked weights: ``gate_up`` [E, G, H] (gate rows first), ``down`` [E, H, I], biases [E, G] and [E, H] or None.

    The tensors may be views of a live model's parameters. Raises :class:`OptionError` where shapes contradict.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = SILU_MUL

    def __post_init__(self) -> None:
        if self.gate_up.dim() != 3 or self.down.dim() != 3:
            raise OptionError(
                f"a bank needs gate_up [E, 2I, H] and down [E, H, I], got {list(self.gate_up.shape)} "
                f"and {list(self.down.shape)}"
            )
        experts, hidden, intermediate = self.down.shape
        rows = 2 * intermediate if self.activation.gated else intermediate
        expected = {
            "gate_up": (experts, rows, hidden),
            "gate_up_bias": (experts, rows),
            "down_bias": (experts, hidden),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise OptionError(
                    f"{name} has shape {list(tensor.shape)}, but down {list(self.down.shape)} with a "
                    f"{'gated' if self.activation.gated else 'plain'} activation needs {list(shape)}"
                )

    @classmethod
    def stack(cls, experts: Sequence[ExpertWeights], activation: Activation = SILU_MUL) -> Self:
        """A bank of the given experts, in order; either all of them have a bias or none."""

        def column(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            if present and len(present) != len(tensors):
                raise OptionError(f"{len(present)} of {len(tensors)} experts have a bias: all or none must")
            return torch.stack(present) if present else None

        if not experts:
            raise OptionError("a bank needs at least one expert, got none")
        gate_up, down, gate_up_bias, down_bias = (column(tensors) for tensors in zip(*experts, strict=True))
        assert gate_up is not None
        assert down is not None
        return cls(gate_up, down, gate_up_bias, down_bias, activation)

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    def expert(self, index: int) -> ExpertWeights:
        """Views of one expert's weights."""
        if not 0 <= index < self.num_experts:
            raise OptionError(f"expert {index} does not exist: this bank has experts 0 to {self.num_experts - 1}")
        bias = (None if b is None else b[index] for b in (self.gate_up_bias, self.down_bias))
        return ExpertWeights(self.gate_up[index], self.down[index], *bias)

    def tensors(self) -> Mapping[str, Tensor]:
        names = ("gate_up", "down", "gate_up_bias", "down_bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def select(self, experts: Sequence[int]) -> Self:
        wrong = [e for e in experts if not 0 <= e < self.num_experts]
        if wrong:
            raise OptionError(f"expert {wrong[0]} does not exist: this bank has experts 0 to {self.num_experts - 1}")
        index = torch.tensor(list(experts), dtype=torch.long, device=self.down.device)
        return replace(self, **{name: tensor[index] for name, tensor in self.tensors().items()})

    def recombine(self, matrix: Tensor) -> Self:
        """New experts as linear combinations of these: row m of ``matrix`` [M, E] holds the coefficients of expert m.

        A one-hot row copies its expert bit for bit (so the identity reproduces the bank); other rows are summed in
        float32 (float64 for a float64 bank) in the order of the experts and rounded once. Zero coefficients are never
        multiplied, so an unused expert's NaN cannot leak.
        """
        if matrix.dim() != 2 or matrix.shape[1] != self.num_experts:
            raise OptionError(
                f"recombine needs a matrix [M, {self.num_experts}] (a column per expert), got {list(matrix.shape)}"
            )
        rows = [[(e, c) for e, c in enumerate(row) if c != 0] for row in matrix.tolist()]
        return replace(self, **{name: _combine(tensor, rows) for name, tensor in self.tensors().items()})

    def permute(self, order: Tensor) -> Self:
        """Reorder the hidden units of each expert: new unit j of expert e is old unit ``order[e, j]`` ([E, I]).

        The function every expert computes stays the same for activations that act unit by unit.
        """
        units = torch.arange(self.intermediate_size, device=order.device).expand(self.num_experts, -1)
        if order.shape != units.shape or not torch.equal(order.sort(dim=1).values, units):
            raise OptionError(
                f"permute needs an order [{self.num_experts}, {self.intermediate_size}] whose rows are permutations, "
                f"got {list(order.shape)}"
            )
        order = order.to(self.down.device)
        rows = torch.cat([order, order + self.intermediate_size], 1) if self.activation.gated else order
        bias = None if self.gate_up_bias is None else self.gate_up_bias.gather(1, rows)
        return replace(
            self,
            gate_up=self.gate_up.gather(1, rows[:, :, None].expand_as(self.gate_up)),
            down=self.down.gather(2, order[:, None, :].expand_as(self.down)),
            gate_up_bias=bias,
        )


def _combine(tensor: Tensor, rows: list[list[tuple[int, float]]]) -> Tensor:
    out = tensor.new_zeros((len(rows), *tensor.shape[1:]))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    for target, parts in zip(out, rows, strict=True):
        if len(parts) == 1 and parts[0][1] == 1:
            target.copy_(tensor[parts[0][0]])
        elif parts:
            total = torch.zeros(tensor.shape[1:], dtype=wide, device=tensor.device)
            for expert, coefficient in parts:
                total.add_(tensor[expert].to(wide), alpha=coefficient)
            target.copy_(total)
    return out
