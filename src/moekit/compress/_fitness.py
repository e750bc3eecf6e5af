"""What a search may be measured by besides divergence: how many of a task's prompts a plan's model answers wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moekit.checkpoint.quantizer import METHOD
from moekit.errors import BudgetError, OptionError
from moekit.measure import exact_match
from moekit.measure.records import read_records
from moekit.plan import LiveLoss, Plan
from moekit.plan.live_streamed import StreamedLoss
from moekit.stream import StreamedModel, memory, open_model

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.stream import Runner


class TaskError:
    """Share of (prompt, answer) pairs that greedy decoding under a plan does not answer exactly, 0 to 1.

    An ``evaluate`` for methods that search; the model, in memory or streamed, is as it was after each measurement.
    """

    def __init__(self, runner: Runner, source: Checkpoint, tokenizer: Any, examples: Sequence[tuple[str, str]]) -> None:
        self._runner, self._tokenizer, self._examples = runner, tokenizer, examples
        two = [np.zeros(2, dtype=np.int64)]  # a loss has to have a text; this one is only told what to become
        self._live: LiveLoss = (
            StreamedLoss(runner, source, two) if isinstance(runner, StreamedModel) else LiveLoss(runner, source, two)
        )
        self.reads_disk = self._live.reads_disk

    def __call__(self, plan: Plan) -> float:
        self._live.become(plan)
        try:
            return 1.0 - exact_match(self._runner, self._tokenizer, self._examples).mean
        finally:
            self._live.restore()


def task_error(
    source: Checkpoint,
    examples: Sequence[tuple[str, str]],
    *,
    device: str = "auto",
    max_ram: int | float | str | None = None,
) -> TaskError:
    """:class:`TaskError` on a checkpoint, opened in float32, or under a cap too small for that in its own dtype.

    Raises:
        OptionError: its experts are packed, and nothing can be written into them. BudgetError: the cap is too small.
    """
    if source.scheme.config.get("quant_method") == METHOD:
        raise OptionError(f"{source.path} has packed experts, which no plan can be tried on: search on its source")
    limit, tokenizer = memory.cap(max_ram), source.tokenizer()
    try:
        runner = open_model(source, device=device, max_ram=limit, dtype=torch.float32)
        return TaskError(runner, source, tokenizer, examples)
    except BudgetError:
        return TaskError(open_model(source, device=device, max_ram=limit), source, tokenizer, examples)


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of a JSONL file, a line ``{"prompt": ..., "answer": ...}`` each.

    Raises TextError for a file that cannot be read, has none, or has a line that is something else.
    """
    return [(prompt, answer) for prompt, answer in read_records(path, ("prompt", "answer"))]
