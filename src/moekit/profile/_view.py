"""What a statistic sees of one MoE layer and one batch: the real tokens, and everything derived from them, once.

Shapes by suffix: T tokens (padding removed), K slots, E experts, H hidden size.
"""

# ruff: noqa: N802 - properties carry their shape in their names

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moekit.profile.schema import HALVES, PHASES

_ROWS = 512
"""Tokens widened to float64 at a time."""


@dataclass(frozen=True)
class Cells:
    """Which sum each token of a batch counts towards.

    ``cell`` int64 [T']: half, domain and phase as one number, -1 for padding; T' counts padding too. ``priority``
    uint64 [T'] ranks tokens for the sample; None where none of them may become one. ``trace`` gives, for the tokens to
    be kept, (position in the batch, row in the result).
    """

    cell: Tensor
    priority: np.ndarray | None = None
    trace: tuple[Sequence[int], Sequence[int]] = ((), ())

    @staticmethod
    def number(half: int, domain: int, phase: int, num_domains: int) -> int:
        return (half * num_domains + domain) * len(PHASES) + phase

    @staticmethod
    def count(num_domains: int) -> int:
        return HALVES * num_domains * len(PHASES)


class View:
    """``observation`` is what ``blocks`` saw; ``previous_TK`` the experts of the MoE layer before, or None.

    ``sampled`` is (position among the real tokens, place in the sample) of the tokens that join the layer's sample.
    """

    sampled: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def __init__(self, observation: Any, cells: Cells, num_experts: int, previous_TK: Tensor | None) -> None:
        self._seen, self.cells, self.num_experts = observation, cells, num_experts
        device = observation.x_TH.device
        self._rows = (cells.cell >= 0).nonzero()[:, 0].to(device)
        self._all = len(self._rows) == len(cells.cell)
        self.cell_T = self._real(cells.cell.to(device))
        self.previous_TK = None if previous_TK is None else self._real(previous_TK.to(device))

    def _real(self, tensor: Tensor) -> Tensor:
        return tensor if self._all else tensor.index_select(0, self._rows)

    @cached_property
    def x_TH(self) -> Tensor:
        return self._real(self._seen.x_TH)

    @cached_property
    def expert_TK(self) -> Tensor:
        return self._real(self._seen.routing.expert)

    @cached_property
    def weight_TK(self) -> Tensor:
        return self._real(self._seen.routing.weight).float()

    @cached_property
    def _weighs_inputs(self) -> bool:
        return bool(self._seen.block.layout.weights_on_input)

    @property
    def read_TH(self) -> Tensor:
        """What an expert reads: the input, or where the family weighs inputs and uses one expert, the two's product."""
        return self.x_TH * self.weight_TK if self._weighs_inputs and self.weight_TK.shape[1] == 1 else self.x_TH

    @property
    def combine_TK(self) -> Tensor | None:
        """float32: what the outputs of experts on ``read_TH`` are multiplied by before they are summed.

        None where inputs are weighed and a token has several: no one ``read_TH`` is what its experts read.
        """
        if not self._weighs_inputs:
            return self.weight_TK
        return self.used_TK.float() if self.weight_TK.shape[1] == 1 else None

    @property
    def priority_T(self) -> np.ndarray | None:
        """uint64, on the CPU; None where no token of the batch may be sampled."""
        return None if self.cells.priority is None else self.cells.priority[(self.cells.cell >= 0).numpy()]

    def domain_T(self, num_domains: int) -> Tensor:
        """int64: index of each token's domain."""
        return self.cell_T // len(PHASES) % num_domains

    @cached_property
    def used_TK(self) -> Tensor:
        return self.expert_TK >= 0

    @cached_property
    def chosen_TE(self) -> Tensor:
        """float32 0/1: which experts each token goes to."""
        return one_hot(self.expert_TK, self.num_experts)

    @cached_property
    def logits_TE(self) -> Tensor | None:
        logits = self._seen.routing.logits
        return None if logits is None else self._real(logits).float()[:, : self.num_experts]

    @cached_property
    def log_probability_TE(self) -> Tensor | None:
        return None if self.logits_TE is None else self.logits_TE.log_softmax(1)

    @cached_property
    def slots_TKH(self) -> Tensor:
        return self._real(self._seen.slots_TKH)

    @cached_property
    def norm_TK(self) -> Tensor:
        """float32: L2 norm of each unweighted expert output."""
        return torch.linalg.vector_norm(self.slots_TKH, dim=-1, dtype=torch.float32)

    @cached_property
    def max_abs_TK(self) -> Tensor:
        return self.slots_TKH.abs().amax(-1).float()

    @cached_property
    def shared_T(self) -> list[Tensor]:
        """float32 [T] for each shared expert: the largest absolute value of its output, before any gate of its own.

        Computed again here; a shared gate (one linear map) is no expert, nor is a module that needs more than inputs.
        """
        experts = [module for module in self._seen.block.shared if _is_expert(module)]
        with torch.no_grad():
            return [self._real(module(self._seen.router_TH)).abs().amax(-1).float() for module in experts]

    @cached_property
    def residual_TH(self) -> Tensor | None:
        residual = self._seen.residual_TH
        return None if residual is None else self._real(residual.reshape(-1, residual.shape[-1]))

    @cached_property
    def change_T(self) -> Tensor | None:
        """float64: max(0, 1 - cos(h, h + R)), h the residual stream entering the block, R the routed part alone.

        In float64, since the cosine of a small update is 1 to within float32's precision. None where the stream cannot
        be told, or the experts write to a narrower space that is projected onto it afterwards.
        """
        if self.residual_TH is None or self._seen.routed_TH.shape[-1] != self.residual_TH.shape[-1]:
            return None
        routed_TH, parts = self._real(self._seen.routed_TH), []
        for start in range(0, len(routed_TH), _ROWS):
            before = self.residual_TH[start : start + _ROWS].double()
            after = before + routed_TH[start : start + _ROWS].double()
            parts.append((1 - torch.cosine_similarity(before, after, dim=1, eps=1e-300)).clamp(min=0))
        return torch.cat(parts) if parts else routed_TH.new_zeros(0, dtype=torch.float64)


def _is_expert(module: nn.Module) -> bool:
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return not isinstance(module, nn.Linear) and len(needed) == 1


def one_hot(expert_TK: Tensor, num_experts: int) -> Tensor:
    """float32 [T, E] of 0 and 1, -1 ids ignored."""
    marks = torch.zeros(expert_TK.shape[0], num_experts + 1, device=expert_TK.device)
    index = torch.where(expert_TK < 0, num_experts, expert_TK)
    return marks.scatter_(1, index, 1.0)[:, :num_experts]
