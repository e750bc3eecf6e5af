"""A dense layer cut into experts by its hidden units: which units go where, and the layer that runs them.

Shapes by suffix: T tokens, K slots, E experts, I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.build._dense import DenseFFN, part
from moekit.errors import OptionError
from moekit.formats import DenseBank
from moekit.train.experts import run_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unit_scores(
    model: PreTrainedModel, layers: Sequence[DenseFFN], rows: Sequence[Tensor], *, norm: bool = False
) -> list[Tensor]:
    """Importance [I] of each layer's hidden units on token rows: mean |h_j * mean_i W_down[i, j]| over tokens.

    With ``norm``, mean |h_j| * ||W_down[:, j]|| instead. Source: the partition of SparseUnifiedModel.
    """
    sums = [torch.zeros(ffn.intermediate_size, dtype=torch.float64) for ffn in layers]

    def watch(total: Tensor) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(args[0].detach().abs().flatten(0, -2).double().sum(0).cpu())

        return add

    mode, count = model.training, sum(len(row) for row in rows)
    with ExitStack() as stack, torch.no_grad():
        for ffn, total in zip(layers, sums, strict=True):
            stack.callback(ffn.module.down_proj.register_forward_pre_hook(watch(total)).remove)
        model.eval()
        for row in rows:
            model(input_ids=row[None].to(model.device), use_cache=False)
    model.train(mode)
    means = [total / max(1, count) for total in sums]
    columns = [ffn.weights.down.double().cpu() for ffn in layers]
    return [m * (down.norm(dim=0) if norm else down.mean(0).abs()) for m, down in zip(means, columns, strict=True)]


def snake(scores_I: Tensor, experts: int, shared: int = 0) -> tuple[Tensor, Tensor]:
    """(units of the shared expert [shared], units of each expert [E, (I - shared) / E]).

    Units in the order of falling importance: the first ``shared`` to the shared expert, the rest dealt like cards,
    every second round backwards, so that the experts' sums are nearly equal. Ties go to the lower unit.
    Raises :class:`OptionError` where the units cannot be dealt evenly.
    """
    order = scores_I.sort(descending=True, stable=True).indices
    rest = len(order) - shared
    if not 0 <= shared < len(order) or rest % experts or rest < experts:
        raise OptionError(
            f"{len(order)} hidden units less {shared} shared ones cannot be dealt evenly to {experts} experts: choose "
            "a number of experts that divides them"
        )
    rounds = order[shared:].view(-1, experts).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return order[:shared], rounds.T.contiguous()


class ResidualRouter(nn.Module):
    """Logits r = x W^T, unnormalised: the K highest choose, and an expert's weight is 1 + r."""

    def __init__(self, weight_EH: Tensor, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(weight_EH)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, K], ids [T, K])."""
        logits = F.linear(x_TH.float(), self.weight.float())
        chosen = logits.topk(self.top_k, dim=-1)
        return logits, (1 + chosen.values).to(x_TH.dtype), chosen.indices


class SplitFFN(nn.Module):
    """In place of a dense layer: y = sum over chosen (1 + r_i) E_i(x) + (1 + g(x)) E_shared(x).

    ``gate_up_proj`` [E, 2i, H] and ``down_proj`` [E, H, i] are slices of the layer; with every expert chosen and zero
    routers it computes what the layer does. ``shared_units`` may be empty.
    """

    def __init__(self, ffn: DenseFFN, units_EU: Tensor, shared_units: Tensor, top_k: int, noise: Tensor) -> None:
        super().__init__()
        weights = ffn.weights
        bank = DenseBank.stack([part(weights, units) for units in units_EU])
        self.act = ffn.act
        self.router = ResidualRouter(noise.to(bank.gate_up), top_k)
        self.gate_up_proj, self.down_proj = nn.Parameter(bank.gate_up), nn.Parameter(bank.down)
        self.shared: nn.ParameterDict | None = None
        if len(shared_units):
            own = part(weights, shared_units)
            gate = bank.gate_up.new_zeros(1, bank.hidden_size)
            self.shared = nn.ParameterDict({"gate_up": own.gate_up, "down": own.down, "router": gate})

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weight, index = self.router(flat)
        y = run_experts(flat, index, weight, self.gate_up_proj, self.down_proj, self._gated)
        if self.shared is not None:
            own = F.linear(self._gated(F.linear(flat, self.shared["gate_up"])), self.shared["down"])
            y = y + (1 + F.linear(flat, self.shared["router"])) * own
        return y.view_as(x)

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up

    def bank(self) -> DenseBank:
        """The routed experts."""
        return DenseBank(self.gate_up_proj.detach(), self.down_proj.detach())


def replace_layer(model: nn.Module, name: str, module: Any) -> None:
    """Put a module where another was."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
