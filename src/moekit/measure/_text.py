"""From text to batches of token windows that know how many bytes of text each of them predicts.

Windows overlap by one token, so that every token but a document's first is predicted exactly once; a tokenizer with a
beginning-of-sequence token predicts the first too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.errors import TextError

LENGTH, BATCH = 512, 8


@dataclass(frozen=True)
class Windows:
    """Token windows as right-padded batches `{"input_ids", "attention_mask"}`, each [B, S].

    `num_bytes` has, for each window in order over all batches, the bytes of text that its predicted tokens stand for;
    `domains` the domain each is of, empty where there is only one.
    """

    batches: tuple[dict[str, Tensor], ...]
    num_bytes: tuple[float, ...]
    domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.num_bytes)


def windows(
    texts: Iterable[str], tokenizer: Any, *, length: int = LENGTH, batch_size: int = BATCH, what: str = "the text"
) -> Windows:
    """Cut texts into windows of at most `length` tokens. Raises TextError where no token is left to predict."""
    rows: list[list[int]] = []
    sizes: list[float] = []
    for text in texts:
        ids, ends = _tokens(text, tokenizer)
        for start in range(0, len(ids) - 1, length - 1):
            row = ids[start : start + length]
            rows.append(row)
            sizes.append(float(ends[start + len(row) - 1] - ends[start]))
    if not rows or sum(sizes) <= 0:
        raise TextError(f"{what} has nothing to predict: give text of at least two tokens")
    return Windows(tuple(pad_batches(rows, tokenizer, batch_size)), tuple(sizes))


def together(parts: Mapping[str, Windows]) -> Windows:
    """Windows of several domains as one text, a batch of each in turn, so that any beginning of it has all of them."""
    batches: list[dict[str, Tensor]] = []
    sizes: list[float] = []
    domains: list[str] = []
    rows = {name: iter(part.num_bytes) for name, part in parts.items()}
    for turn in zip_longest(*(part.batches for part in parts.values())):
        for name, batch in zip(parts, turn, strict=True):
            if batch is not None:
                batches.append(batch)
                found = [next(rows[name]) for _ in batch["input_ids"]]
                sizes, domains = sizes + found, domains + [name] * len(found)
    return Windows(tuple(batches), tuple(sizes), tuple(domains))


def pad_batches(rows: Sequence[Sequence[int]], tokenizer: Any, batch_size: int = BATCH) -> list[dict[str, Tensor]]:
    """Right-padded batches of token rows in order, with their attention masks."""
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = torch.full((len(part), max(map(len, part))), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token as a list, empty where the tokenizer does not put one before a text by itself."""
    ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _tokens(text: str, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """Token ids of a document, and the byte position at which each token ends."""
    total = len(text.encode("utf-8", "replace"))
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    if fast and ids:
        position = np.cumsum([0] + [len(char.encode("utf-8", "replace")) for char in text])
        ends = position[np.maximum.accumulate([end for _, end in encoded["offset_mapping"]])]
    else:  # no offsets to be had: every token stands for the same share of the text
        ends = np.linspace(0, total, len(ids) + 1)[1:]
    begin = beginning(tokenizer)
    return begin + ids, np.concatenate([np.zeros(len(begin)), ends])
