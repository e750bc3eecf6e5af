"""Training a model whose experts lie in a file: each is fetched, used, differentiated and stepped by itself.

Shapes by suffix: T tokens, K slots, M tokens of one expert, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from moekit.blocks import blocks
from moekit.errors import UnsupportedModelError
from moekit.kernels.experts import experts_forward
from moekit.run._expert_states import Adam, ExpertStates
from moekit.run._layers import check
from moekit.run._tier import used
from moekit.run.policy import CachePolicy

NAME = "moekit-states"


@dataclass(eq=False)
class OnDisk:
    """A model whose experts train from a file: ``states``, and the ``modules`` they belong to.

    The loop: ``loss.backward()`` steps every expert that was used as soon as its gradient is whole; then the optimizer
    of all other parameters; then :meth:`advance`. A batch is one forward and one backward: gradients are not
    accumulated, scaled or clipped over experts.
    """

    states: ExpertStates
    modules: list[Any]

    def advance(self, rate: float | None = None) -> None:
        """The step is over; the next has another learning ``rate`` if one is given."""
        self.states.advance(rate)

    @torch.no_grad()
    def settle(self) -> None:
        """Put all experts back into the model, which then trains and saves as ever."""
        for layer, module in enumerate(self.modules):
            del module.__dict__["_moekit_states"]
            for name, parameter in _stacked(module):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=True))
            for expert in range(module.num_experts):
                own = self.states.weights((layer, expert))
                for (_, parameter), weight in zip(_stacked(module), own, strict=True):
                    parameter[expert] = weight
            module.config._experts_implementation = "moekit"


def train_on_disk(
    model: PreTrainedModel,
    folder: str | Path,
    most: int,
    adam: Adam | None = None,
    evict: str | CachePolicy = "decayed-lfu",
) -> OnDisk:
    """Move the experts of ``model`` (float32) to ``folder``, with Adam's moments; at most ``most`` stay in memory.

    A folder with states of the same experts is taken up where it was left. The model's own expert parameters are
    then on the meta device, and no gradient reaches them.

    Raises:
        UnsupportedModelError: experts that do not lie stacked in float32 behind transformers' shared contract.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found = blocks(model)
    for block in found:
        check(block)
        if any(parameter.dtype != torch.float32 for _, parameter in _stacked(block.experts)):
            raise UnsupportedModelError("experts are trained from disk in float32: load the model with that dtype")
    modules: list[Any] = [block.experts for block in found]
    shapes = {
        (layer, expert): [parameter.shape[1:] for _, parameter in _stacked(module)]
        for layer, module in enumerate(modules)
        for expert in range(module.num_experts)
    }
    fresh = not (Path(folder) / "states.json").exists()
    states = ExpertStates(folder, shapes, most, adam, evict)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    for layer, module in enumerate(modules):
        if fresh:
            for expert in range(module.num_experts):
                states.put((layer, expert), [parameter[expert] for _, parameter in _stacked(module)])
        for name, parameter in list(_stacked(module)):
            setattr(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
        module.__dict__["_moekit_states"] = _Layer(states, layer, module)
        module.config._experts_implementation = NAME
    return OnDisk(states, modules)


class _Layer:
    """One module's experts: the family's own layout and activation on a stack of one."""

    def __init__(self, states: ExpertStates, layer: int, module: Any) -> None:
        self.states, self.layer, self.num_experts = states, layer, module.num_experts
        self.names = [name for name, _ in _stacked(module)]
        self._shell = copy.copy(module)
        self._shell.num_experts = 1

    def stacked(self, expert: int) -> dict[str, nn.Parameter]:
        """One expert's tensors, in a stack of one."""
        weights = self.states.weights((self.layer, expert))
        return {name: nn.Parameter(one[None]) for name, one in zip(self.names, weights, strict=True)}

    def rows(self, stacked: dict[str, nn.Parameter], x_MH: Tensor, weight_M: Tensor) -> Tensor:
        """[M, H]: weighted outputs of one expert."""
        self._shell._parameters = {**self._shell._parameters, **stacked}
        index_M1 = torch.zeros(len(x_MH), 1, dtype=torch.int64)
        return experts_forward(self._shell, x_MH, index_M1, weight_M[:, None])

    def used(self, index_TK: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, tokens [M], their slots [M]) of every expert in use, in order."""
        experts = used(index_TK, self.num_experts)
        self.states.routed(self.layer, experts)
        for expert in experts:
            token_M, slot_M = torch.where(index_TK == expert)
            yield expert, token_M, slot_M


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor, own: _Layer) -> Tensor:
        ctx.save_for_backward(x_TH, weight_TK, index_TK)
        ctx.own = own
        out_TH = torch.zeros_like(x_TH)
        for expert, token_M, slot_M in own.used(index_TK):
            rows_MH = own.rows(own.stacked(expert), x_TH[token_M], weight_TK[token_M, slot_M])
            out_TH.index_add_(0, token_M, rows_MH)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_TK, index_TK = ctx.saved_tensors
        own: _Layer = ctx.own
        dx_TH, dweight_TK = torch.zeros_like(x_TH), torch.zeros_like(weight_TK)
        for expert, token_M, slot_M in own.used(index_TK):
            stacked = own.stacked(expert)
            x_MH = x_TH[token_M].detach().requires_grad_()
            weight_M = weight_TK[token_M, slot_M].detach().requires_grad_()
            with torch.enable_grad():
                rows = own.rows(stacked, x_MH, weight_M)
            inputs = (x_MH, weight_M, *stacked.values())
            dx_MH, dweight_M, *d_weights = torch.autograd.grad(rows, inputs, grads[0][token_M])
            dx_TH.index_add_(0, token_M, dx_MH)
            dweight_TK[token_M, slot_M] = dweight_M
            own.states.update((own.layer, expert), [d[0] for d in d_weights])
        return dx_TH, dweight_TK, None, None


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    own: _Layer = self.__dict__["_moekit_states"]
    out: Tensor = _Experts.apply(hidden_states, top_k_weights, top_k_index, own)
    return out


def _stacked(module: Any) -> list[tuple[str, nn.Parameter]]:
    """A module's own parameters that hold one row per expert."""
    return [(n, p) for n, p in module.named_parameters(recurse=False) if p.shape[0] == module.num_experts]
