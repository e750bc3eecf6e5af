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
from moekit.kernels import BankExperts, warm_up
from moekit.run import _ahead
from moekit.run._device import Away
from moekit.run._planes import PagedPlanes
from moekit.run._predictors_gate import NextGate
from moekit.run._room import working_bytes
from moekit.run._stand_in import Read, StandIns, TwoPools, open_stand_ins
from moekit.run._tier import Tier
from moekit.run._tiers import Paged, largest, paged, paged_parameters
from moekit.run.defaults import remembered, usual
from moekit.run.policy import CachePolicy
from moekit.run.policy import policy as named
from moekit.run.predict import Predictor, Signal
from moekit.run.store import ExpertStore
from moekit.stream import Cap, LoadedModel, cap, pick_device

NAME = "moekit-paged"
THREADS = 4
"""Experts read at the same time: enough to keep a solid-state disk busy."""
DEFAULT_CONTEXT = 2048


@dataclass(eq=False)
class Paging:
    """What pages a model's experts: its ``store``, the ``layers`` it serves in order, and what predicts their use.

    ``horizon``: layers ahead that ``predictor`` looks, ``width``: experts fetched ahead for each, at most. ``context``:
    tokens per sequence that the budget reckons with. ``history``: the distinct experts of every batch, layer by layer,
    as (layer, experts); None where it is not kept. ``tokens``: computed so far. ``signal``: what this forward call has
    told a predictor.
    ``stand_ins``: copies at fewer bits that are used for some missing experts; logits are then no longer exact.
    ``planes``: of a model stored as nested planes, how many levels above the bases a batch may read at a layer; slots
    for which that is too few run narrower, which is not exact either. None: all that its heads ask for.
    ``below``: what reads from disk where ``store`` copies to another device; None where it reads itself.
    """

    store: ExpertStore
    blocks: list[MoEBlock]
    predictor: Predictor | None = None
    horizon: int = 1
    width: int = 0
    context: int = DEFAULT_CONTEXT
    history: list[tuple[int, tuple[int, ...]]] | None = None
    tokens: int = 0
    signal: Signal = field(default_factory=Signal)
    stand_ins: StandIns | None = None
    planes: int | None = None
    below: ExpertStore | None = None

    @property
    def expert_bytes(self) -> int:
        """All experts, as they lie in memory."""
        return sum(sum(layer.charge) for layer in self.store.layers)

    def close(self) -> None:
        """Stop reading ahead and give all memory of experts back; the model cannot be run any more."""
        self.store.close()
        if self.below is not None:
            self.below.close()


class _Served:
    """One experts module whose weights come from the store while it runs (a kernel's ``Arrivals``)."""

    def __init__(self, paging: Paging, layer: int, tier: Paged) -> None:
        self.paging, self.layer, self.tier = paging, layer, tier
        self._read: Tensor | None = None
        self._scores: Sequence[float] | None = None

    @property
    def most(self) -> int:
        return self.paging.store.most(self.layer)

    def __call__(self, experts: Sequence[int]) -> None:
        self.paging.store.need(self.layer, self.tier.places(experts))

    def routed(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What the router read and said, noted for what follows (a forward hook)."""
        block = self.paging.blocks[self.layer]
        self._read, _ = block.router.context(args, kwargs)
        logits_TE = block.router.logits(output, self._read)[:, : block.num_experts]
        self._scores = self.tier.scored(logits_TE.float().softmax(1).mean(0).tolist())

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x_TH.requires_grad or weight_TK.requires_grad):
            raise OptionError("paged experts have no backward: call the model under torch.no_grad()")
        paging, store, stand_ins = self.paging, self.paging.store, self.paging.stand_ins
        low_TK: Tensor | None = None
        if stand_ins is not None:
            index_TK, low_TK = stand_ins.split(store, self.layer, index_TK, weight_TK)
        if paging.planes is not None and isinstance(self.tier, PagedPlanes):
            there = {place for layer, place in store.resident() if layer == self.layer}
            index_TK = self.tier.lowered(index_TK, there, paging.planes)
        experts = self.tier.wanted(index_TK)
        if paging.history is not None:
            paging.history.append((self.layer, tuple(experts)))
        store.begin(self.layer, experts, self._scores)
        read_TH = x_TH if self._read is None else self._read
        _ahead.reached(paging, self.layer, read_TH, self.tier.chosen(index_TK))
        self._read = self._scores = None
        try:
            with torch.no_grad():
                y_TH = self.tier.run(x_TH, index_TK, weight_TK, self)
        finally:
            store.end()
        if stand_ins is None or low_TK is None:
            return y_TH
        return y_TH + stand_ins.run(store, self.layer, x_TH, low_TK, weight_TK)


def load(
    ref: str | os.PathLike[str] | Checkpoint,
    memory: int | float | str | Cap | None = None,
    *,
    policy: str | CachePolicy | None = None,
    ahead: int | None = None,
    context: int = DEFAULT_CONTEXT,
    dtype: torch.dtype | None = None,
    threads: int = THREADS,
    device: str = "cpu",
    device_memory: int | float | str | None = None,
    stand_in: str | os.PathLike[str] | Checkpoint | None = None,
    read: Read | None = None,
) -> PreTrainedModel:
    """The model at ``ref`` with as many experts in memory as fit under the cap, the others read when they are used.

    Args:
        ref: a folder, a cached hub id, ``moekit:NAME`` or an open checkpoint; in its family's own files.
        memory: cap on the peak resident set of the whole process: bytes, "4GB", or None for all experts in memory.
        policy: which experts make room for others, see :func:`moekit.run.policy`; None for what tuning found for this
            model, else what is usual for the share of experts that fits (:func:`moekit.run.defaults.usual`).
        ahead: how many experts of the next layer are read while one computes, as its router would choose now; None for
            what goes with the policy that was found, none with a policy that is named.
        context: tokens, prompt and answer together, of all sequences of a batch, that memory is set aside for.
        dtype: of the weights in memory; the checkpoint's own if None.
        threads: how many experts are read at the same time.
        device: where to compute: "cpu", or "cuda" with everything but experts and the hot ones there. ``memory`` is
            then for experts that are kept ready to be copied. "auto": cuda where there is one.
        device_memory: cap on what tensors take there; what is free if None.
        stand_in: the same model's experts packed by moekit in fewer bits, used for missing experts where ``read`` says
            so: (experts [T, K], weights [T, K]) -> 2 as it is, 1 packed, 0 left out, by expert. Logits are then not
            exact; nothing is read ahead, so that they follow from the tokens alone.

    Raises:
        BudgetError: the cap is too small for the rest of the model and one expert; names the smallest that works.
        CheckpointError: no usable checkpoint. OptionError: an unknown policy, no size.
        UnsupportedModelError: a family whose experts cannot be paged.
    """
    checkpoint = ref if isinstance(ref, Checkpoint) else Checkpoint.open(ref)
    if context < 1 or threads < 1 or (ahead or 0) < 0:
        raise OptionError("context and threads must be at least 1, and ahead at least 0")
    if (stand_in is None) != (read is None) or (stand_in is not None and ahead):
        raise OptionError("stand-ins need a checkpoint (stand_in) and a rule (read), and nothing read ahead (ahead=0)")
    limit, where = cap(memory), pick_device(device)
    away = None if where == torch.device("cpu") else Away(where, device_memory)
    if away is not None and stand_in is not None:
        raise OptionError("stand-ins are packed, and packed experts are computed on the CPU: leave device out")
    first = policy if isinstance(policy, CachePolicy) else named(policy or "lru", checkpoint.fingerprint)

    warm_up(dtype or checkpoint.scheme.dtype)

    def beside(model: PreTrainedModel) -> int:
        return max(map(largest, _banks(model))) + working_bytes(model, checkpoint, context)

    held = limit if away is None else None
    model = LoadedModel.load(
        checkpoint, dtype=dtype, device=where, absent=_expert_keys, beside=beside, max_ram=held
    ).model
    found, reader = _banks(model), Reader(checkpoint.path, checkpoint.tensors, direct=True)
    layers: Sequence[Tier] = [paged(checkpoint, reader, _layer(checkpoint, block), block) for block in found]
    stand_ins: StandIns | None = None
    if stand_in is not None and read is not None:
        stand_ins = StandIns(open_stand_ins(stand_in, checkpoint, found, model.dtype), read)
        layers = [*layers, *stand_ins.tiers]
    working = working_bytes(model, checkpoint, context)
    room = _room(limit, working) if away is None else away.room(working)
    below = None if away is None else away.below(layers, limit.room(), threads)
    if away is not None and below is not None:
        layers, threads = away.tiers(below, found), 1
    store = ExpertStore(layers, max(layer.unit for layer in layers), first, threads)
    paging = Paging(store, found, context=context, stand_ins=stand_ins, below=below)
    _install(model, paging)
    store.resize(paging.expert_bytes if room is None else min(room, paging.expert_bytes))
    _page_by(paging, checkpoint, None if policy is None else first, ahead)
    model.__dict__["_moekit_paging"] = paging
    return model


def paging(model: PreTrainedModel) -> Paging:
    """What pages the experts of a model that :func:`load` opened. Raises :class:`OptionError` for any other."""
    if "_moekit_paging" not in model.__dict__:
        raise OptionError(f"the experts of this {type(model).__name__} are not paged: open it with moekit.load")
    return model.__dict__["_moekit_paging"]


def _room(limit: Cap, working: int) -> int | None:
    """What is left for experts. Raises :class:`BudgetError` where a context does not fit."""
    limit.require(working, "a context")
    room = limit.room()
    return None if room is None else room - working


def _page_by(paging: Paging, checkpoint: Checkpoint, policy: CachePolicy | None, ahead: int | None) -> None:
    """Who makes room and how much is read ahead, now that it is known how much fits."""
    if policy is None:
        share = paging.store.budget / paging.expert_bytes
        choice = remembered(checkpoint) or usual(share, paging.blocks[0].top_k)
        policy, ahead = named(choice.policy, checkpoint.fingerprint), choice.ahead if ahead is None else ahead
    exact = paging.stand_ins is None
    paging.store.clear(policy if exact else TwoPools(policy, len(paging.blocks)))
    paging.width = (ahead or 0) if exact else 0
    paging.predictor = NextGate([block.choose for block in paging.blocks]) if paging.width else None


def _layer(checkpoint: Checkpoint, block: MoEBlock) -> MoELayer:
    named = {layer.name: layer for layer in checkpoint.moe_layers}
    if block.name not in named:
        raise UnsupportedModelError(f"{block.name} has no experts of its own on disk: run this model in memory")
    return named[block.name]


def _expert_keys(model: PreTrainedModel) -> list[str]:
    """State-dict keys of the weights that are paged. Raises where they cannot be."""
    parts = {id(block.experts): paged_parameters(block) for block in _banks(model)}
    named = model.named_modules(remove_duplicate=False)
    return [f"{name}.{part}" for name, module in named for part in parts.get(id(module), ())]


def _banks(model: PreTrainedModel) -> list[MoEBlock]:
    """A block for every bank of experts; where several routers choose from one, that of the first."""
    first: dict[int, MoEBlock] = {}
    for block in blocks(model, shared=True):
        first.setdefault(id(block.experts), block)
    return list(first.values())


def _install(model: PreTrainedModel, paging: Paging) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _paged_forward)
    for index, block in enumerate(paging.blocks):
        tier, module = paging.store.layers[index], block.experts
        assert isinstance(tier, Paged)
        served = _Served(paging, index, tier)
        if isinstance(module, BankExperts):
            module.serve = served.forward
        else:
            module.__dict__["_moekit_served"] = served
            module.config._experts_implementation = NAME
        if not block.router.inline:
            block.router_module.register_forward_hook(served.routed, with_kwargs=True)
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
    _ahead.begin(paging, ids, kwargs.get("attention_mask"), new=not before)
