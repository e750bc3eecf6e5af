"""What a plan costs where the model does not fit in memory: one pass layer by layer from disk per plan.

Each layer's experts are overwritten with what the plan makes of them, one expert at a time, once the layer is resident
and before anything runs through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moekit.blocks import MoEBlock, blocks
from moekit.checkpoint.quantizer import METHOD
from moekit.errors import BudgetError
from moekit.formats import DenseBank
from moekit.plan.edited import overwrite
from moekit.plan.layer import LayerPlan
from moekit.plan.live import KEPT_LOGITS, TOKENS, LiveLoss, batches, some
from moekit.plan.live_rows import live_rows, write_rows
from moekit.plan.recombine import stored
from moekit.stream import LoadedModel, StreamedModel, open_model
from moekit.stream.memory import Cap, cap

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer

Progress = Callable[[int, int], None]

FEWEST_POSITIONS = 256
"""Positions of which the reference is kept at least: fewer would say nothing."""
WORKING_COPIES = 8
"""Float32 copies of one expert that reading, summing, rounding and decoding it take at once."""


def live_loss(
    source: Checkpoint,
    sequences: Mapping[str, Sequence[np.ndarray]],
    *,
    tokens: int = TOKENS,
    device: str = "auto",
    max_ram: int | float | str | None = None,
    progress: Progress | None = None,
) -> LiveLoss | None:
    """Losses of plans on about ``tokens`` tokens, domains in turn: in memory where the model fits, else streamed. None
    where there is nothing to run it on, or where the source's experts are packed, which nothing can be written into.

    In float32; streamed under a cap too small for a layer of that, in the checkpoint's own dtype. ``progress`` is told
    of (done, total) steps of each pass, the source's own first.

    Raises:
        BudgetError: the cap is too small for that too; names the smallest that works.
    """
    chosen, limit = some(sequences, tokens), cap(max_ram)
    if not chosen or source.scheme.config.get("quant_method") == METHOD:
        return None
    try:
        return _opened(source, chosen, device, limit, torch.float32, progress)
    except BudgetError:
        return _opened(source, chosen, device, limit, None, progress)


def _opened(
    source: Checkpoint,
    chosen: Sequence[np.ndarray],
    device: str,
    limit: Cap,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> LiveLoss:
    runner = open_model(source, device=device, max_ram=limit, dtype=dtype)
    if isinstance(runner, LoadedModel):
        return LiveLoss(runner, source, chosen, progress=progress)
    return StreamedLoss(runner, source, chosen, progress)


class StreamedLoss(LiveLoss):
    """:class:`LiveLoss` on a model that streams: the same losses, each in one pass over the weights on disk.

    Raises:
        BudgetError: the runner's cap is too small for a layer, the expert being rewritten, one sequence and the
            reference's log-probabilities at ``FEWEST_POSITIONS`` positions.
    """

    reads_disk = True

    def __init__(
        self,
        runner: StreamedModel,
        source: Checkpoint,
        sequences: Sequence[np.ndarray],
        progress: Progress | None = None,
    ) -> None:
        self._checkpoint = source
        live = {block.name: block for block in blocks(runner.model)}
        sizes = [rewriting_bytes(layer, live[layer.name]) for layer in source.moe_layers if layer.name in live]
        runner.edit_bytes = max(sizes, default=0)
        vocabulary = runner.model.config.get_text_config().vocab_size
        widest = max(batches(sequences, 1), key=lambda batch: batch.numel())
        needed, least = runner.needed_bytes({"input_ids": widest}), 4 * vocabulary * FEWEST_POSITIONS
        # Beside the reference itself lie the same positions of the plan at hand and two temporaries of one batch.
        runner.cap.require(needed + 2 * least, "measuring a plan layer by layer")
        room = runner.cap.room()
        kept = KEPT_LOGITS if room is None else min(KEPT_LOGITS, max(least, (room - needed) // 2) // 4)
        runner.edit = self._rewrite
        super().__init__(runner, source, sequences, rows=1, kept=kept, progress=progress)

    def _set(self, block: MoEBlock, plan: LayerPlan) -> None:
        self._mask(block, plan)  # its weights follow when they are there

    def _rewrite(self, path: str) -> None:
        for name, block in self._blocks.items():
            plan = self._now.get(name)
            if name.startswith(f"{path}.") and plan is not None and not plan.untouched:
                rewrite(block, self._checkpoint, plan)
                overwrite(self._runner.model, self._checkpoint, None, plan)
                write_rows(self._runner.model, self._checkpoint, self._checkpoint.layer(name), None, plan)


@torch.no_grad()
def rewrite(block: MoEBlock, source: Checkpoint, plan: LayerPlan) -> None:
    """Overwrite the experts of a resident block as the plan's output would compute, a stored expert at a time."""
    bank = block.bank()
    assert isinstance(bank, DenseBank)
    callers: dict[int, list[int]] = {}
    for row, slot in live_rows(plan, block.groups).items():
        callers.setdefault(slot, []).append(row)
    for slot, rows in callers.items():
        if rows == [plan.experts[slot].parts[0][0]] and plan.experts[slot].untouched and plan.values is None:
            continue
        made = _one(source, block.name, plan, slot).tensors()
        for name, tensor in bank.tensors().items():
            tensor[rows] = made[name].to(tensor)
    if not _views(block):
        block.put(bank)


def _one(source: Checkpoint, layer: str, plan: LayerPlan, slot: int) -> DenseBank:
    """The stored expert of one slot as it will compute, a bank of one; reads only what it is made of."""
    expert = plan.experts[slot]
    sources = sorted({part for part, _ in expert.parts})
    local = replace(expert, parts=tuple((sources.index(part), c) for part, c in expert.parts))
    values = plan.values and plan.values.select([slot])
    alone = replace(LayerPlan.identity(1), num_experts=len(sources), experts=(local,), values=values)
    return stored(source.bank(layer, sources), alone)


def _views(block: MoEBlock) -> bool:
    """Whether the block's bank is its parameters seen from another side, rather than a copy; true on meta too."""
    own = {parameter.untyped_storage()._cdata for parameter in block.experts.parameters()}
    bank = block.bank()
    assert isinstance(bank, DenseBank)
    return all(tensor.untyped_storage()._cdata in own for tensor in bank.tensors().values())


def rewriting_bytes(layer: MoELayer, block: MoEBlock) -> int:
    """Memory that rewriting a layer takes on top of its weights: one expert at work, and the bank where it is a
    copy."""
    shape = layer.shape
    numel = (3 if shape.gated else 2) * shape.hidden_size * shape.intermediate_size
    return 4 * numel * (WORKING_COPIES + (0 if _views(block) else layer.num_experts))
