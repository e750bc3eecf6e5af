"""What a plan costs, measured without writing anything: the model in memory computes as the plan's output would.

Every expert of a live block is replaced by the stored expert its router row would call, rounded as it would be, and the
rows the plan drops are masked; shapes stay, so one model serves for any number of plans.
Shapes by suffix: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moekit.blocks import Edit, MoEBlock, blocks
from moekit.errors import PlanError
from moekit.formats import DenseBank
from moekit.plan.document import Plan
from moekit.plan.layer import LayerPlan
from moekit.plan.planner import Source
from moekit.plan.recombine import stored
from moekit.stream import LoadedModel, open_model

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

KEPT_LOGITS = 100_000_000
"""Reference log-probabilities held in memory, at four bytes each; positions are thinned to fit."""
BATCH, TOKENS = 8, 4096


def split_held_out(
    held_out: Mapping[str, Sequence[np.ndarray]],
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Token sequences kept aside, by domain, dealt into those that may choose a plan and those that judge it later:
    every second sequence of a domain each, a single one cut in the middle."""
    choose: dict[str, list[np.ndarray]] = {}
    judge: dict[str, list[np.ndarray]] = {}
    for domain, found in held_out.items():
        pieces = [np.asarray(piece) for piece in found]
        if len(pieces) == 1:
            middle = len(pieces[0]) // 2
            pieces = [pieces[0][:middle], pieces[0][middle:]]
        choose[domain], judge[domain] = pieces[::2], pieces[1::2]
    return choose, judge


def live_loss(
    source: Checkpoint,
    sequences: Mapping[str, Sequence[np.ndarray]],
    *,
    tokens: int = TOKENS,
    device: str = "auto",
    max_ram: int | float | str | None = None,
) -> LiveLoss | None:
    """A :class:`LiveLoss` on about ``tokens`` tokens, domains in turn; None where the model does not fit in memory, or
    there is nothing to run it on."""
    chosen, total = [], 0
    for piece in (p for row in zip_longest(*sequences.values()) for p in row if p is not None and len(p) > 1):
        if total < tokens:
            chosen.append(piece[: max(tokens - total, 2)])
            total += len(chosen[-1])
    if not chosen:
        return None
    runner = open_model(source, device=device, max_ram=max_ram, dtype=torch.float32)
    return LiveLoss(runner, source, chosen) if isinstance(runner, LoadedModel) else None


class LiveLoss:
    """KL divergence of a plan's output from the source, in nats per token, on fixed calibration tokens.

    The runner's model is changed while plans are measured and as it was after :meth:`restore`.
    """

    def __init__(self, runner: LoadedModel, source: Source, sequences: Sequence[np.ndarray]) -> None:
        self._runner, self._source = runner, source
        self._blocks: dict[str, MoEBlock] = {block.name: block for block in blocks(runner.model)}
        self._now: dict[str, LayerPlan] = {}
        self._masks: dict[str, Edit] = {}
        self._batches = list(_batches(sequences))
        vocabulary = runner.model.config.get_text_config().vocab_size
        positions = sum(batch.numel() for batch in self._batches)
        self._step = max(1, -(-positions * vocabulary // KEPT_LOGITS))
        self._reference = [self._log_probability(batch) for batch in self._batches]
        self.evaluations = 0

    @property
    def num_tokens(self) -> int:
        """Positions whose predictions are compared."""
        return sum(len(reference) for reference in self._reference)

    def become(self, plan: Plan) -> None:
        """Let the model compute as the plan's output would, until the next plan or :meth:`restore`."""
        for name, block in self._blocks.items():
            self._set(block, plan.layer(name, block.num_experts))

    def __call__(self, plan: Plan) -> float:
        self.evaluations += 1
        self.become(plan)
        total = 0.0
        for batch, wanted_NV in zip(self._batches, self._reference, strict=True):
            found_NV = self._log_probability(batch)
            total += float((wanted_NV.exp() * (wanted_NV - found_NV)).sum(dtype=torch.float64))
        return max(total / self.num_tokens, 0.0)

    def restore(self) -> None:
        """Undo whatever was last measured."""
        self.become(Plan(source=self._source.fingerprint, layers={}))

    def _set(self, block: MoEBlock, plan: LayerPlan) -> None:
        same = LayerPlan.identity(block.num_experts)
        if self._now.get(block.name, same) == plan:
            return
        if block.name in self._masks:
            self._masks.pop(block.name).remove()
        block.put(simulated(self._source.bank(block.name), plan))
        live = live_rows(plan)
        if len(live) < block.num_experts:
            self._masks[block.name] = block.mask(sorted(live)).attach()
        self._now[block.name] = plan

    def _log_probability(self, batch: Tensor) -> Tensor:
        (logits,) = self._runner.forward([{"input_ids": batch}])
        kept = logits[:, :-1].reshape(-1, logits.shape[-1])[:: self._step]
        return kept.float().log_softmax(-1).cpu()


def simulated(bank: DenseBank, plan: LayerPlan) -> DenseBank:
    """E experts of which number e computes what the plan's output does for source row e; masked rows keep any."""
    made, live = stored(bank, plan), live_rows(plan)
    return made.select([live.get(e, 0) for e in range(plan.num_experts)])


def live_rows(plan: LayerPlan) -> dict[int, int]:
    """Source row -> stored expert, for the rows that can be chosen. PlanError where rows are blended."""
    live = {}
    for row, slot in zip(plan.rows, plan.slots, strict=True):
        if len(row) != 1 or row[0][1] != 1.0:
            raise PlanError("a plan that blends router rows can only be measured once it is applied")
        if slot >= 0:
            live[row[0][0]] = slot
    return live


def _batches(sequences: Sequence[np.ndarray]) -> Any:
    """Sequences of one length side by side, [B, S] each; of two tokens or more."""
    by_length: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(np.asarray(sequence))
    for length, rows in sorted(by_length.items()):
        if length > 1:
            for start in range(0, len(rows), BATCH):
                yield torch.from_numpy(np.stack(rows[start : start + BATCH]).astype(np.int64))
