"""Stand-ins: packed copies of a model's experts, read where a missing expert is not worth its full precision.

The copies are a second set of tiers of the same store: the copies of layer l's experts are its layer L + l. Nothing
here is exact, so what it costs is measured: :func:`divergence`.

Shapes by suffix: S sequence, T tokens, K slots, E experts, H hidden size.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moekit.blocks import MoEBlock, blocks
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.reader import Reader
from moekit.errors import OptionError, UnsupportedModelError
from moekit.formats import PackedBank
from moekit.kernels import BankExperts
from moekit.plan import Plan
from moekit.run._banks import PagedBank
from moekit.run._tier import used
from moekit.run.policy import CachePolicy, Key

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.run.store import ExpertStore

HIGH, LOW, SKIP = 2, 1, 0
_OTHER = "{} was made of another model than {}: its experts cannot stand in"
Read = Callable[[np.ndarray, np.ndarray], dict[int, int]]
"""(experts int [T, K], -1 where a slot is unused; combine weights [T, K]) -> what each is read at if it is missing."""


class StandIns:
    """The copies of all layers, and ``read``, which says when they stand in.

    An expert that is resident is used as it is. One that is missing is fetched (HIGH), its copy is used (LOW), or it is
    left out and the others keep their weights (SKIP); a copy that happens to be resident is never left out. ``exact``
    switches all of it off. ``uses`` counts experts of batches by what became of them: there, HIGH, LOW, SKIP.
    """

    def __init__(self, tiers: Sequence[PagedBank], read: Read) -> None:
        self.tiers, self.read, self.exact = list(tiers), read, False
        self.uses: dict[str | int, int] = {"there": 0, HIGH: 0, LOW: 0, SKIP: 0}

    def split(
        self, store: ExpertStore, layer: int, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The routing of the experts as they are and that of their copies, -1 where a slot is the other's or nobody's.

        The second is None where no copy is used: the first is then the routing itself, unless experts are left out.
        """
        experts = used(index_TK, self.tiers[layer].num_experts)
        if self.exact:
            return index_TK, None
        there, wanted = set(store.resident()), self._wanted(index_TK, weight_TK, experts)
        low, gone = list[int](), list[int]()
        for expert in experts:
            level = wanted.get(expert, SKIP)
            if (layer, expert) in there:
                self.uses["there"] += 1
                continue
            if level == SKIP and (len(self.tiers) + layer, expert) in there:
                level = LOW
            self.uses[level] += 1
            if level != HIGH:
                gone.append(expert)
                if level == LOW:
                    low.append(expert)
        high_TK = index_TK.masked_fill(_among(index_TK, gone), -1) if gone else index_TK
        return high_TK, index_TK.masked_fill(~_among(index_TK, low), -1) if low else None

    def run(self, store: ExpertStore, layer: int, x_TH: Tensor, low_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """What the copies add [T, H]."""
        at = len(self.tiers) + layer
        store.begin(at, used(low_TK, self.tiers[layer].num_experts))
        try:
            with torch.no_grad():
                return self.tiers[layer].run(x_TH, low_TK, weight_TK, _Arrivals(store, at))
        finally:
            store.end()

    def _wanted(self, index_TK: Tensor, weight_TK: Tensor, experts: list[int]) -> dict[int, int]:
        index = np.where(np.isin(index_TK.numpy(), experts), index_TK.numpy(), -1)
        return self.read(index, np.where(index >= 0, weight_TK.float().numpy(), 0.0))


@dataclass(frozen=True)
class _Arrivals:
    store: ExpertStore
    layer: int

    @property
    def most(self) -> int:
        return self.store.most(self.layer)

    def __call__(self, experts: Sequence[int]) -> None:
        self.store.need(self.layer, experts)


def open_stand_ins(ref: object, source: Checkpoint, found: Sequence[MoEBlock], dtype: torch.dtype) -> list[PagedBank]:
    """The packed experts at ``ref`` as tiers, one for each block of the model at ``source``. Reads headers only.

    Raises:
        OptionError: not made of this source, or not packed by moekit with every expert in its place.
        UnsupportedModelError: experts with biases or norms of their own.
    """
    checkpoint = ref if isinstance(ref, Checkpoint) else Checkpoint.open(ref)  # type: ignore[arg-type]
    _check_source(checkpoint, source)
    named = {block.name: block for block in blocks(checkpoint.skeleton(dtype))}
    layers = {layer.name: layer for layer in checkpoint.moe_layers}
    reader, tiers = Reader(checkpoint.path, checkpoint.tensors, direct=True), list[PagedBank]()
    for block in found:
        other = named.get(block.name)
        if other is None or not _alike(other, block):
            raise OptionError(
                f"{checkpoint.path} does not hold all {block.num_experts} experts of {block.name} packed, each in its "
                "place: make it with bits alone, such as rtn:bits=4"
            )
        if other.experts.has_bias or other.experts.has_post_expert_norm:
            raise UnsupportedModelError(f"the experts of {block.name} have biases or norms: they have no stand-ins")
        tiers.append(PagedBank(checkpoint, reader, layers[block.name], other))
    if not _same_routers(checkpoint, source):
        raise OptionError(_OTHER.format(checkpoint.path, source.path))
    return tiers


def _check_source(checkpoint: Checkpoint, source: Checkpoint) -> None:
    plan = checkpoint.path / "plan.json"
    if not plan.is_file():
        raise OptionError(
            f"{checkpoint.path} has no plan.json that says what it was made of: make it with moekit apply"
        )
    own = source.path / "plan.json"  # both may be packed, made of one model
    origins = {source.fingerprint} | ({Plan.load(own).source} if own.is_file() else set())
    if Plan.load(plan).source not in origins:
        raise OptionError(_OTHER.format(checkpoint.path, source.path))


def _same_routers(checkpoint: Checkpoint, source: Checkpoint) -> bool:
    """Fingerprints cover shapes and places; that the weights are those of the same model shows in the routers."""
    names = [row.name for layer in source.moe_layers for row in layer.row_tensors]
    pairs = ((checkpoint.read_plain(name), source.read_plain(name)) for name in names if name in checkpoint.stored)
    return all(torch.equal(one.float(), two.float()) for one, two in pairs)


def _alike(other: MoEBlock, block: MoEBlock) -> bool:
    """Whether copy e is that of expert e: both keep every expert where the router's rows have it."""
    packed = [one.experts for one in (other, block) if isinstance(one.experts, BankExperts)]
    plain = all(m.slots is None and m.rewrite is None and isinstance(m.bank, PackedBank) for m in packed)
    return plain and isinstance(other.experts, BankExperts) and other.experts.bank.num_experts == block.num_experts


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What stand-ins change: ``kl`` nats per token, KL(exact || with stand-ins), and the share of ``tokens`` of which
    both find the same likeliest (``agree``)."""

    kl: float
    agree: float
    tokens: int


@torch.no_grad()
def divergence(model: PreTrainedModel, stand_ins: StandIns, ids: Tensor, prompt: int) -> Divergence:
    """Of the tokens that follow the first ``prompt`` of ``ids`` [1, S]: read one by one as they were generated, from
    the cache as it is, and once more with every expert as it is.

    The first reading's probabilities wait in a temporary file, so that a cap on memory holds.

    Raises:
        OptionError: nothing follows the prompt.
    """
    if not 0 < prompt < ids.shape[1]:
        raise OptionError(f"a prompt of {prompt} tokens out of {ids.shape[1]}: expected some before and some after it")
    kl, agree, before = 0.0, 0, stand_ins.exact
    with tempfile.TemporaryFile() as spool:
        for row_V in _step_by_step(model, ids, prompt):
            spool.write(row_V.numpy().tobytes())
        spool.seek(0)
        stand_ins.exact = True
        try:
            for exact_V in _step_by_step(model, ids, prompt):
                with_V = torch.frombuffer(bytearray(spool.read(4 * len(exact_V))), dtype=torch.float32)
                kl += float((exact_V.exp() * (exact_V - with_V)).sum())
                agree += int(exact_V.argmax() == with_V.argmax())
        finally:
            stand_ins.exact = before
    tokens = ids.shape[1] - prompt
    return Divergence(kl=max(kl / tokens, 0.0), agree=agree / tokens, tokens=tokens)


def _step_by_step(model: PreTrainedModel, ids: Tensor, prompt: int) -> Iterator[Tensor]:
    """Log-probabilities [V] of what follows each position from the prompt's last on, the end left out."""
    output = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
    yield output.logits[0, -1].float().log_softmax(-1)
    for at in range(prompt, ids.shape[1] - 1):
        output = model(input_ids=ids[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
        yield output.logits[0, -1].float().log_softmax(-1)


def _among(index_TK: Tensor, experts: Collection[int]) -> Tensor:
    return torch.isin(index_TK, torch.tensor(sorted(experts), dtype=index_TK.dtype))


class TwoPools(CachePolicy):
    """Experts and copies in pools of their own, each with the policy ``inner``.

    An incoming expert takes the place of one of its own pool where that is half of what is resident or more, else of
    one of the other: by bytes the pool of experts is the larger.
    """

    def __init__(self, inner: CachePolicy, layers: int) -> None:
        self.pools, self.layers = (inner, copy.deepcopy(inner)), layers

    def reset(self) -> None:
        for pool in self.pools:
            pool.reset()

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self.pools[layer >= self.layers].routed(layer % self.layers, experts, scores)

    def admitted(self, key: Key) -> None:
        self.pools[key[0] >= self.layers].admitted((key[0] % self.layers, key[1]))

    def evicted(self, key: Key) -> None:
        self.pools[key[0] >= self.layers].evicted((key[0] % self.layers, key[1]))

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        own = incoming[0] >= self.layers
        count = sum((key[0] >= self.layers) == own for key in resident)
        for side in (own, not own) if 2 * count >= len(resident) else (not own, own):
            inside = self._of(side, resident)
            if inside:
                new = incoming[0] % self.layers, incoming[1]
                found = self.pools[side].victim(inside, self._of(side, pinned), new)
                if found is not None:
                    return found[0] + side * self.layers, found[1]
        return None

    def _of(self, side: bool, keys: Collection[Key]) -> list[Key]:
        return [(layer % self.layers, expert) for layer, expert in keys if (layer >= self.layers) == side]
