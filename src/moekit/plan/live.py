"""What a plan costs, measured without writing anything: the model in memory computes as the plan's output would.

Every expert of a live block is replaced by the stored expert its router row would call, rounded as it would be, and the
rows the plan drops are masked, those it blends written (``live_rows``); shapes stay, so one model serves for any number
of plans.
Shapes by suffix: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moekit.blocks import Edit, MoEBlock, blocks
from moekit.blocks.rewriting import attach
from moekit.formats import DenseBank
from moekit.plan.document import Plan
from moekit.plan.edited import overwrite
from moekit.plan.layer import LayerPlan
from moekit.plan.live_rows import live_rows, standing, write_rows
from moekit.plan.planner import Source
from moekit.plan.recombine import stored
from moekit.plan.rewriting import rewrite_of
from moekit.stream import Runner

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


def some(sequences: Mapping[str, Sequence[np.ndarray]], tokens: int = TOKENS) -> list[np.ndarray]:
    """About ``tokens`` tokens of the sequences, domains in turn; those of one token alone predict nothing."""
    chosen: list[np.ndarray] = []
    total = 0
    for piece in (p for row in zip_longest(*sequences.values()) for p in row if p is not None and len(p) > 1):
        if total < tokens:
            chosen.append(piece[: max(tokens - total, 2)])
            total += len(chosen[-1])
    return chosen


class LiveLoss:
    """KL divergence of a plan's output from the source, in nats per token, on fixed calibration tokens.

    The runner's model is changed while plans are measured and as it was after :meth:`restore`. ``rows`` sequences run
    side by side; of the reference's log-probabilities at most ``kept`` are held, positions thinned to fit.
    ``progress``, if set, is told of (done, total) steps of each measurement.
    """

    reads_disk = False
    """Whether each measurement reads the model from disk."""

    def __init__(
        self,
        runner: Runner,
        source: Source,
        sequences: Sequence[np.ndarray],
        *,
        rows: int = BATCH,
        kept: int = KEPT_LOGITS,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._runner, self._source = runner, source
        self._blocks: dict[str, MoEBlock] = {block.name: block for block in blocks(runner.model)}
        self._now: dict[str, LayerPlan] = {}
        self._changes: dict[str, list[Edit | RemovableHandle]] = {}
        self._batches = list(batches(sequences, rows))
        vocabulary = runner.model.config.get_text_config().vocab_size
        positions = sum(batch.numel() for batch in self._batches)
        self._step = max(1, -(-positions * vocabulary // kept))
        self.progress = progress
        self.evaluations = 0
        self._reference = list(self._log_probabilities())

    @property
    def num_tokens(self) -> int:
        """Positions whose predictions are compared."""
        return sum(len(reference) for reference in self._reference)

    def become(self, plan: Plan) -> None:
        """Let the model compute as the plan's output would, until the next plan or :meth:`restore`."""
        for name, block in self._blocks.items():
            layer = plan.layer(name, block.num_experts)
            if self._now.get(name, LayerPlan.identity(block.num_experts)) != layer:
                self._set(block, layer)
                self._now[name] = layer

    def __call__(self, plan: Plan) -> float:
        self.evaluations += 1
        self.become(plan)
        total = 0.0
        for wanted_NV, found_NV in zip(self._reference, self._log_probabilities(), strict=True):
            total += float((wanted_NV.exp() * (wanted_NV - found_NV)).sum(dtype=torch.float64))
        return max(total / self.num_tokens, 0.0)

    def restore(self) -> None:
        """Undo whatever was last measured."""
        self.become(Plan(source=self._source.fingerprint, layers={}))

    def _set(self, block: MoEBlock, plan: LayerPlan) -> None:
        source, before = cast("Checkpoint", self._source), self._now.get(block.name)
        overwrite(self._runner.model, source, before, plan)
        write_rows(self._runner.model, source, source.layer(block.name), before, plan)
        self._mask(block, plan)
        block.put(simulated(source.bank(block.name), plan, block.groups))

    def _mask(self, block: MoEBlock, plan: LayerPlan) -> None:
        """Let only the rows be chosen that the plan keeps, and rewrite the routing if it says so."""
        live = live_rows(plan, block.groups)
        for handle in self._changes.pop(block.name, []):
            handle.remove()
        changes: list[Edit | RemovableHandle] = []
        if len(live) < block.num_experts:
            changes.append(block.mask(sorted(live)).attach())
        if (rewrite := rewrite_of(plan, block.hidden_size)) is not None:
            bank = None
            if rewrite.EXPANDS and plan.values is not None:
                bank = plan.values.bank(activation=self._source.bank(block.name).activation)
            changes.append(attach(rewrite, block, standing(plan, block.groups), bank))
        self._changes[block.name] = changes

    def _log_probabilities(self) -> Iterator[Tensor]:
        """[N, V] of each batch, positions thinned."""
        asked = [{"input_ids": batch} for batch in self._batches]
        for logits in self._runner.forward(asked, on_layer=self.progress):
            kept = logits[:, :-1].reshape(-1, logits.shape[-1])[:: self._step]
            yield kept.float().log_softmax(-1).cpu()


def simulated(bank: DenseBank, plan: LayerPlan, groups: tuple[int, int] | None) -> DenseBank:
    """E experts of which number e computes what the plan's output does for the row at place e; masked rows keep any."""
    made, live = stored(bank, plan), live_rows(plan, groups)
    return made.select([live.get(e, 0) for e in range(plan.num_experts)])


def batches(sequences: Sequence[np.ndarray], rows: int) -> Iterator[Tensor]:
    """Sequences of one length side by side, [B, S] each with B at most ``rows``; of two tokens or more."""
    by_length: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(np.asarray(sequence))
    for length, alike in sorted(by_length.items()):
        if length > 1:
            for start in range(0, len(alike), rows):
                yield torch.from_numpy(np.stack(alike[start : start + rows]).astype(np.int64))
