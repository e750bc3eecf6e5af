"""Exact match on tasks with one right answer."""

from collections.abc import Sequence
from typing import Any

import torch

from moekit.errors import TextError
from moekit.measure._interval import Interval
from moekit.measure._runner import Runner
from moekit.measure._text import BATCH, beginning, pad_batches


@torch.no_grad()
def exact_match(
    runner: Runner, tokenizer: Any, examples: Sequence[tuple[str, str]], *, stop: str = "\n", batch_size: int = BATCH
) -> Interval:
    """Share of (prompt, answer) pairs that greedy decoding answers exactly, ending in `stop`; interval by bootstrap.

    Greedy decoding gives the tokens of the answer if and only if, with those tokens fed in, each of them is ranked
    first after the ones before it. So one forward pass over prompt + answer + stop decides them all, with the same
    verdict as decoding token by token, also where layers stream from disk. Raises TextError without examples.
    """
    if not examples:
        raise TextError("exact match needs at least one example, got none")
    rows, starts = [], []
    for prompt, answer in examples:
        head = beginning(tokenizer) + _ids(tokenizer, prompt)
        rows.append(head + _ids(tokenizer, answer + stop))
        starts.append(len(head))
    batches = pad_batches(rows, tokenizer, batch_size)
    right: list[float] = []
    for batch, logits in zip(batches, runner.forward(batches), strict=True):
        best = logits[:, :-1].argmax(-1).cpu()
        for guess, row in zip(best.tolist(), batch["input_ids"].tolist(), strict=True):
            start, end = starts[len(right)], len(rows[len(right)])
            right.append(float(guess[start - 1 : end - 1] == row[start:end]))
    return Interval.bootstrap(right)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
