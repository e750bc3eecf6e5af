"""Opening a model of which only a part is in memory: everything but experts stays, experts come and go one by one.

The result is a transformers model: its own ``generate``, streamers, batching and chat templates work as ever. Logits
are bit for bit those of the same model with all experts in memory, whatever the cap, for every policy that does not
say otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.blocks import MoEBlock, blocks
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.checkpoint.reader import Reader
from moekit.errors import BudgetError, OptionError, UnsupportedModelError
from moekit.run._layers import PagedExperts, charge, check, stacked, used
from moekit.run._room import working_bytes
from moekit.run.policy import CachePolicy
from moekit.run.policy import policy as named
from moekit.run.predict import Predictor, Signal
from moekit.run.store import Counters, ExpertStore
from moekit.stream import Cap, LoadedModel, cap

NAME = "moekit-paged"
THREADS = 4
"""Experts read at the same time: enough to keep a solid-state disk busy."""
DEFAULT_CONTEXT = 2048
DEFAULT_POLICY = "lru"


@dataclass(eq=False)
class Paging:
    """What pages a model's experts: its ``store``, the ``layers`` it serves in order, and what predicts their use.

    ``horizon``: layers ahead that ``predictor`` looks, ``width``: experts fetched ahead for each, at most. ``context``:
    tokens per sequence that the budget reckons with. ``history``: the distinct experts of every batch, layer by layer,
    as (layer, experts); None where it is not kept. ``tokens``: computed so far.
    """

    store: ExpertStore
    blocks: list[MoEBlock]
    predictor: Predictor | None = None
    horizon: int = 1
    width: int = 0
    context: int = DEFAULT_CONTEXT
    history: list[tuple[int, tuple[int, ...]]] | None = None
    tokens: int = 0
    routing: dict[int, Any] = field(default_factory=dict)

    @property
    def expert_bytes(self) -> int:
        """All experts, as they lie in memory."""
        return sum(layer.charge * layer.num_experts for layer in self.store.layers)

    def close(self) -> None:
        """Stop reading ahead and give all memory of experts back; the model cannot be run any more."""
        self.store.close()


class _Served:
    """One experts module whose weights come from the store while it runs."""

    def __init__(self, paging: Paging, layer: int, run: Any) -> None:
        self.paging, self.layer, self.run = paging, layer, run

    @property
    def most(self) -> int:
        return self.paging.store.most(self.layer)

    def __call__(self, experts: Sequence[int]) -> None:
        self.paging.store.need(self.layer, experts)

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x_TH.requires_grad or weight_TK.requires_grad):
            raise OptionError("paged experts have no backward: call the model under torch.no_grad()")
        paging, store = self.paging, self.paging.store
        experts = used(index_TK, store.layers[self.layer].num_experts)
        if paging.history is not None:
            paging.history.append((self.layer, tuple(experts)))
        store.begin(self.layer, experts, _scores(index_TK, weight_TK, store.layers[self.layer].num_experts))
        self._look_ahead(x_TH, index_TK, experts)
        try:
            with torch.no_grad():
                return self.run(x_TH, index_TK, weight_TK, self)
        finally:
            store.end()

    def _look_ahead(self, x_TH: Tensor, index_TK: Tensor, experts: list[int]) -> None:
        paging = self.paging
        if paging.predictor is None:
            return
        if self.layer == 0:
            paging.routing.clear()
        paging.routing[self.layer] = index_TK.cpu().numpy()
        paging.predictor.observe(self.layer, experts)
        ahead = paging.predictor.predict(self.layer, Signal(x_TH=x_TH, routing=paging.routing), paging.horizon)
        for distance, ranked in enumerate(ahead, start=1):
            wanted = [expert for expert, _ in ranked[: paging.width]]
            paging.store.prefetch(self.layer + distance, wanted)


def load(
    ref: str | os.PathLike[str] | Checkpoint,
    memory: int | float | str | Cap | None = None,
    *,
    policy: str | CachePolicy | None = None,
    context: int = DEFAULT_CONTEXT,
    dtype: torch.dtype | None = None,
    threads: int = THREADS,
) -> PreTrainedModel:
    """The model at ``ref`` with as many experts in memory as fit under the cap, the others read when they are used.

    Args:
        ref: a folder, a cached hub id, ``moekit:NAME`` or an open checkpoint; in its family's own files.
        memory: cap on the peak resident set of the whole process: bytes, "4GB", or None for all experts in memory.
        policy: which experts make room for others, see :func:`moekit.run.policy`; None for the usual one.
        context: tokens, prompt and answer together, of all sequences of a batch, that memory is set aside for.
        dtype: of the weights in memory; the checkpoint's own if None.
        threads: how many experts are read at the same time.

    Raises:
        BudgetError: the cap is too small for the rest of the model and one expert; names the smallest that works.
        CheckpointError: no usable checkpoint. OptionError: an unknown policy, no size.
        UnsupportedModelError: a family whose experts cannot be paged.
    """
    checkpoint = ref if isinstance(ref, Checkpoint) else Checkpoint.open(ref)
    if context < 1 or threads < 1:
        raise OptionError("context and threads must be at least 1")
    limit = cap(memory)
    chosen = policy if isinstance(policy, CachePolicy) else named(policy or DEFAULT_POLICY)

    def beside(model: PreTrainedModel) -> int:
        return max(map(charge, blocks(model))) + working_bytes(model, checkpoint, context)

    model = LoadedModel.load(checkpoint, dtype=dtype, absent=_expert_keys, beside=beside, max_ram=limit).model
    found, reader = blocks(model), Reader(checkpoint.path, checkpoint.tensors, direct=True)
    layers = [PagedExperts(checkpoint, reader, _layer(checkpoint, block), block) for block in found]
    smallest, working = max(layer.charge for layer in layers), working_bytes(model, checkpoint, context)
    paging = Paging(ExpertStore(layers, smallest, chosen, threads), found, context=context)
    _install(model, paging)
    _warm_up(paging)
    limit.require(working, "a context")
    room = limit.room()
    budget = paging.expert_bytes if room is None else room + paging.store.held_bytes - working
    paging.store.resize(min(budget, paging.expert_bytes))
    model.__dict__["_moekit_paging"] = paging
    return model


def paging(model: PreTrainedModel) -> Paging:
    """What pages the experts of a model that :func:`load` opened. Raises :class:`OptionError` for any other."""
    if "_moekit_paging" not in model.__dict__:
        raise OptionError(f"the experts of this {type(model).__name__} are not paged: open it with moekit.load")
    return model.__dict__["_moekit_paging"]


def _layer(checkpoint: Checkpoint, block: MoEBlock) -> MoELayer:
    named = {layer.name: layer for layer in checkpoint.moe_layers}
    if block.name not in named:
        raise UnsupportedModelError(f"{block.name} has no experts of its own on disk: run this model in memory")
    return named[block.name]


def _expert_keys(model: PreTrainedModel) -> list[str]:
    """State-dict keys of the stacked weights that are paged. Raises where they cannot be."""
    names, keys = {module: name for name, module in model.named_modules()}, list[str]()
    for block in blocks(model):
        check(block)
        keys += [f"{names[block.experts]}.{part}" for part in stacked(block.experts)]
    return keys


def _scores(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> list[float]:
    """Mean combine weight of every expert over the batch, [E]."""
    score = torch.zeros(num_experts + 1)
    index = torch.where((index_TK >= 0) & (index_TK < num_experts), index_TK, num_experts)
    score.index_add_(0, index.reshape(-1).cpu(), weight_TK.detach().reshape(-1).float().cpu())
    return (score[:-1] / max(len(index_TK), 1)).tolist()


def _install(model: PreTrainedModel, paging: Paging) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _paged_forward)
    for index, block in enumerate(paging.blocks):
        tier: Any = paging.store.layers[index]
        module: Any = block.experts
        module.__dict__["_moekit_served"] = _Served(paging, index, tier.run)
        module.config._experts_implementation = NAME
    model.register_forward_pre_hook(partial(_before, paging), with_kwargs=True)


def _paged_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return self.__dict__["_moekit_served"].forward(hidden_states, top_k_index, top_k_weights)


def _before(paging: Paging, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count tokens; refuse what memory was not set aside for, rather than break the promise of the cap."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        return
    cache = kwargs.get("past_key_values")
    before = cache.get_seq_length() if cache is not None else 0
    if (length := ids.shape[0] * (before + ids.shape[1])) > paging.context:
        raise BudgetError(
            f"{length} tokens are to be held, but memory was set aside for {paging.context}: "
            f"open the model with context={length} or more"
        )
    paging.tokens += ids.numel()
    if not before:
        paging.store.reset()


@torch.no_grad()
def _warm_up(paging: Paging) -> None:
    """Run the first layer once with few and with many rows, so that compiled kernels and their buffers are resident
    before the budget is reckoned."""
    module: Any = paging.blocks[0].experts
    dtype = next(iter(module.parameters())).dtype
    for rows in (1, 64):
        x_TH = torch.zeros(rows, paging.blocks[0].hidden_size, dtype=dtype)
        module(x_TH, torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, 1, dtype=dtype))
    paging.store.counters = Counters()
