"""Read-ME: a dense model cut into domain experts, one of which runs all layers of a token, chosen before the first.

Paper: Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design, 2024 (n 25).
Method: s_i[c] = mean |h_c| over domain i's tokens, h what down_proj reads; mask m_i = the top half; r = AND_i m_i runs
    always, m_i - r for tokens of expert i, the same i in every layer. A small causal transformer reads token ids and
    chooses i; it learns KL(q || softmax G), q = softmax_j |m_0 AND m_j|, m_0 the token's own top half, summed over
    layers. Knowing the queue: exact prefetch, eviction of what is used last (Belady), batches by expert.
Uses: run._batches (by expert), run._policies_known, run._predictors_path, run._predictors_seen, run.replay
Differs: the router has learned positions in a window and LayerNorm, no rotations; the hard choice carries no weight, as
    in the released code; Belady is driven with queued tokens only, generated ones have no known future.
Claim: 4.7 B of 17 B active made of a 7 B model with 1 B tokens: MMLU 38.9 against 26.4; latency -6.1 %.
Shown: lab.experiments.read_me
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.errors import OptionError
from moekit.profile import RoutingTrace
from moekit.run._policies_known import Belady
from moekit.run._predictors_path import PathNet
from moekit.run._predictors_seen import Oracle
from moekit.run.replay import Counters, replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "pre_router"


# -- experts: N domains, I hidden units


def importance(model: PreTrainedModel, layers: Sequence[Any], rows: Sequence[Tensor]) -> list[Tensor]:
    """Mean |h| [I] of each feed-forward layer's hidden units over one domain's token rows."""
    sums = [torch.zeros(layer.down_proj.weight.shape[1], dtype=torch.float64) for layer in layers]
    with torch.no_grad():
        for row in rows:
            for total, h_TI in zip(sums, hidden(model, layers, row[None]), strict=True):
                total.add_(h_TI.abs().double().sum(0))
    return [total / max(sum(map(len, rows)), 1) for total in sums]


def hidden(model: PreTrainedModel, layers: Sequence[Any], ids_BS: Tensor) -> list[Tensor]:
    """What each feed-forward layer's down_proj reads [B S, I]."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.down_proj.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, -2)))
            stack.callback(hook.remove)
        model(input_ids=ids_BS, use_cache=False)
    return found


def top_half(value: Tensor, share: float = 0.5) -> Tensor:
    """Bool [..., I]: the largest ``share`` of the last axis (at least one); ties go to the lower unit.

    Raises:
        OptionError: a share outside 0 to 1.
    """
    if not 0 < share <= 1:
        raise OptionError(f"a share of {share:g} of the hidden units: expected more than 0 and at most 1")
    order = value.sort(dim=-1, descending=True, stable=True).indices[..., : max(1, round(share * value.shape[-1]))]
    return torch.zeros_like(value, dtype=torch.bool).scatter(-1, order, True)


class AlignedFFN(nn.Module):
    """In place of a gated dense layer: y = FFN_shared(x) + FFN_i(x), i the expert of the token at hand.

    ``mask_NI`` bool: the units of each domain. Weights are slices of the layer's, ``experts.N`` and ``shared``; a unit
    of several domains but not of all is held, and trained, by each. ``route`` [T] is set by whoever routes.
    """

    def __init__(self, layer: Any, mask_NI: Tensor) -> None:
        super().__init__()
        self.act = layer.act_fn
        shared_I = mask_NI.all(0)
        self.shared = _slice(layer, shared_I)
        self.experts = nn.ModuleList(_slice(layer, mask_I & ~shared_I) for mask_I in mask_NI)
        self.route: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        assert self.route is not None, "not routed"
        y_TH = self._run(self.shared, x_TH)
        for index, expert in enumerate(self.experts):
            token = (self.route == index).nonzero()[:, 0]
            if len(token):
                y_TH = y_TH.index_add(0, token, self._run(expert, x_TH[token]))
        return y_TH.view_as(x)

    def _run(self, own: Any, x_TH: Tensor) -> Tensor:
        gate, up = F.linear(x_TH, own["gate_up"]).chunk(2, dim=-1)
        return F.linear(self.act(gate) * up, own["down"])


def _slice(layer: Any, mask_I: Tensor) -> nn.ParameterDict:
    gate_up = torch.cat([layer.gate_proj.weight[mask_I], layer.up_proj.weight[mask_I]]).detach().clone()
    return nn.ParameterDict({"gate_up": gate_up, "down": layer.down_proj.weight[:, mask_I].detach().clone()})


# -- the router, and a model routed by it


def overlap_target(h_TI: Tensor, mask_NI: Tensor, share: float = 0.5) -> Tensor:
    """q [T, N] = softmax over experts of how many of a token's own strongest units each expert's mask holds."""
    own_TI = top_half(h_TI.abs(), share).to(torch.float32)
    return (own_TI @ mask_NI.to(torch.float32).T).softmax(-1)


def routing_distillation(logits_TN: Tensor, hidden_L: Sequence[Tensor], masks_L: Sequence[Tensor]) -> Tensor:
    """L_RD: KL(q_l || softmax G) in nats, mean over tokens, summed over layers."""
    log_g_TN, total = logits_TN.log_softmax(-1), logits_TN.new_zeros(())
    for h_TI, mask_NI in zip(hidden_L, masks_L, strict=True):
        total = total + F.kl_div(log_g_TN, overlap_target(h_TI, mask_NI), reduction="batchmean")
    return total


class PreRouter(nn.Module):
    """Token ids [B, S] -> logits [B, S, N]: one causal transformer block, read in windows."""

    def __init__(self, vocabulary: int, experts: int, width: int = 64, window: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = PathNet(vocabulary, 1, experts, width=width, depth=1, window=window)

    def forward(self, ids_BS: Tensor) -> Tensor:
        parts = [self.net(piece)[:, :, 0] for piece in ids_BS.split(self.net.window, dim=1)]
        return torch.cat(parts, dim=1)


class Routed:
    """A model whose feed-forward layers are :class:`AlignedFFN`, routed once per token before its first layer: ``with
    Routed(model, layers, router):``. The router's parameters are ``pre_router.*`` of the model meanwhile.

    Whole sequences only. Raises :class:`OptionError` at a call that goes on from a cache.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[AlignedFFN], router: PreRouter) -> None:
        self.model, self.layers, self.router = model, layers, router
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self.model.add_module(NAME, self.router)
        self._hooks = [self.model.register_forward_pre_hook(self._before, with_kwargs=True)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            layer.route = None
        del self.model._modules[NAME]

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise OptionError("a pre-routed model reads whole sequences: call it with use_cache=False")
        with torch.no_grad():
            route_T = self.router(kwargs.get("input_ids", args[0] if args else None)).argmax(-1).flatten()
        for layer in self.layers:
            layer.route = route_T


# -- a queue of tokens whose experts are known


def queue(expert_T: Sequence[int], batches: Sequence[Sequence[int]], layers: int, experts: int) -> RoutingTrace:
    """The future: every batch asks each of ``layers`` for its tokens' experts, the same in every layer."""
    order = np.concatenate([np.asarray(batch, int) for batch in batches])
    step = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    chosen = np.asarray(expert_T, np.int32)[order][:, None, None]
    zeros = np.zeros(len(order), np.int64)
    return RoutingTrace(
        expert=np.repeat(chosen, layers, axis=1),
        weight=np.ones((len(order), layers, 1), np.float32),
        sequence=zeros,
        step=step,
        decode=zeros.astype(bool),
        num_experts=(experts,) * layers,
        domain=zeros,
    )


def served(future: RoutingTrace, capacity: int, width: int = 0) -> Counters:
    """The queue through a cache of ``capacity`` experts that evicts by the known future; with ``width``, so many
    experts of the next layer are read ahead, exactly those that will be asked for."""
    known = Oracle(future.requests, future.num_layers) if width else None
    return replay(future, Belady(future.requests), capacity, known, width=width)


def distinct(expert_T: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Mean number of experts per batch."""
    return float(np.mean([len({expert_T[token] for token in batch}) for batch in batches]))


def in_order(count: int, size: int) -> list[list[int]]:
    """Batches in the order of arrival."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
