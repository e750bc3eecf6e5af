"""Bits per byte: the loss of a model on text in units that do not depend on its tokenizer."""

from collections.abc import Iterable, Mapping
from math import log
from typing import Any

import torch

from moekit.measure._interval import Interval
from moekit.measure._logits import token_nll
from moekit.measure._runner import Runner
from moekit.measure._text import BATCH, LENGTH, windows


@torch.no_grad()
def bits_per_byte(
    runner: Runner,
    texts: Mapping[str, Iterable[str]] | Iterable[str],
    tokenizer: Any,
    *,
    length: int = LENGTH,
    batch_size: int = BATCH,
) -> dict[str, Interval]:
    """Bits per byte of each domain (of the one domain "text" where no mapping is given), lower is better.

    The sum of -log2 p over all predicted tokens divided by the bytes they stand for; the interval resamples windows of
    `length` tokens. One pass through the model for all domains together. Raises TextError for a domain without text.
    """
    domains = texts if isinstance(texts, Mapping) else {"text": texts}
    cut = {
        name: windows(lines, tokenizer, length=length, batch_size=batch_size, what=f"domain {name!r}")
        for name, lines in domains.items()
    }
    batches = [batch for part in cut.values() for batch in part.batches]
    nats = [
        value
        for batch, logits in zip(batches, runner.forward(batches), strict=True)
        for value in token_nll(logits, batch).sum(1).tolist()
    ]
    scores, start = {}, 0
    for name, part in cut.items():
        bits = [value / log(2) for value in nats[start : start + len(part)]]
        scores[name] = Interval.bootstrap(bits, part.num_bytes)
        start += len(part)
    return scores
