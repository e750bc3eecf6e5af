"""From documents to token sequences: cut, dealt into halves, some kept aside, grouped into batches. No randomness
but the seed's."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.errors import TextError
from moekit.profile.texts import Document

MAX_HELD_OUT = 16384
"""Most tokens per domain that are kept aside for measuring."""
_LEAST = 2
"""A sequence shorter than this has nothing to predict."""


@dataclass(frozen=True)
class TokenSequence:
    """One piece of a document: ``ids`` int64, the domain it is from and the half it counts towards."""

    ids: np.ndarray
    domain: int
    half: int


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. ``number`` [B] says which they are; ``mask`` is False at padding."""

    number: tuple[int, ...]
    ids: Tensor
    mask: Tensor

    def inputs(self) -> dict[str, Tensor]:
        padded = {"attention_mask": self.mask.long()} if not bool(self.mask.all()) else {}
        return {"input_ids": self.ids, **padded}


def cut(
    texts: Mapping[str, Sequence[Document]],
    tokenizer: Any,
    *,
    length: int,
    max_tokens: int | None,
    held_out: float,
    seed: int,
) -> tuple[list[TokenSequence], dict[str, list[np.ndarray]]]:
    """(sequences to observe, token ids kept aside by domain).

    Each document is tokenised by itself (token ids are taken as they are) and cut every ``length`` tokens; the pieces
    of a domain are shuffled, a share ``held_out`` of them is put aside, and the others are taken in turn until the
    domain's share of ``max_tokens`` (the last one shortened to fit). Raises TextError where a domain has too little
    text to observe.
    """
    sequences: list[TokenSequence] = []
    aside: dict[str, list[np.ndarray]] = {}
    budget = None if max_tokens is None else max(_LEAST, max_tokens // len(texts))
    for index, (domain, documents) in enumerate(texts.items()):
        pieces = _pieces(documents, tokenizer, length)
        if not pieces:
            raise TextError(f"domain '{domain}' has fewer than {_LEAST} tokens in every document: give more text")
        # By the domain's name, so that the choice does not depend on what else is profiled.
        np.random.default_rng([seed, zlib.crc32(domain.encode())]).shuffle(pieces)
        aside[domain], pieces = _keep_aside(pieces, held_out)
        for number, ids in enumerate(_first(pieces, budget)):
            sequences.append(TokenSequence(ids, index, number % 2))
    return sequences, aside


def _pieces(documents: Sequence[Document], tokenizer: Any, length: int) -> list[np.ndarray]:
    pieces = []
    for document in documents:
        whole = _ids(document, tokenizer) if isinstance(document, str) else document.astype(np.int64)
        pieces += [whole[start : start + length] for start in range(0, len(whole), length)]
    return [piece for piece in pieces if len(piece) >= _LEAST]


def _ids(document: str, tokenizer: Any) -> np.ndarray:
    # A rendered chat begins with the special token already; a second one would be text no model has seen.
    begun = bool(tokenizer.bos_token) and document.startswith(tokenizer.bos_token)
    return np.asarray(tokenizer(document, add_special_tokens=not begun, verbose=False)["input_ids"], dtype=np.int64)


def _keep_aside(pieces: list[np.ndarray], share: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(kept aside, to observe). A domain of one piece gives its end; every domain keeps something to observe."""
    if share <= 0:
        return [], pieces
    if len(pieces) == 1:
        tail = max(_LEAST, round(len(pieces[0]) * share))
        whole = len(pieces[0]) < 2 * _LEAST or len(pieces[0]) - tail < _LEAST
        return ([], pieces) if whole else ([pieces[0][-tail:]], [pieces[0][:-tail]])
    wanted, taken, count = min(MAX_HELD_OUT, share * sum(map(len, pieces))), 0, 0
    while count < len(pieces) - 1 and taken < wanted:
        taken += len(pieces[count])
        count += 1
    return pieces[:count], pieces[count:]


def _first(pieces: list[np.ndarray], budget: int | None) -> list[np.ndarray]:
    if budget is None:
        return pieces
    taken: list[np.ndarray] = []
    for piece in pieces:
        left = budget - sum(map(len, taken))
        if left < _LEAST:
            break
        taken.append(piece[:left])
    return taken


def batches(sequences: Sequence[TokenSequence], *, tokens: int, pad: int, padded: bool = True) -> list[Batch]:
    """Sequences of like length together, longest first, at most ``tokens`` tokens (or one sequence) to a batch.

    With ``padded`` False only sequences of equal length share a batch.
    """
    order = sorted(range(len(sequences)), key=lambda n: (-len(sequences[n].ids), n))
    groups: list[list[int]] = []
    for number in order:
        size = len(sequences[number].ids)
        longest = len(sequences[groups[-1][0]].ids) if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= tokens and (padded or longest == size):
            groups[-1].append(number)
        else:
            groups.append([number])
    return [_batch(sequences, group, pad) for group in groups]


def share(
    sequences: Sequence[TokenSequence], grouped: Sequence[Batch], number: int, count: int
) -> tuple[list[TokenSequence], list[Batch]]:
    """Every ``count``-th batch from ``number`` on, as it would be in the whole run, and the sequences in them.

    Raises TextError where there are fewer batches than parts.
    """
    if len(grouped) < count:
        raise TextError(f"the text makes {len(grouped)} batches, too few for {count} parts: give more text")
    mine: list[TokenSequence] = []
    renumbered = []
    for batch in grouped[number::count]:
        renumbered.append(replace(batch, number=tuple(range(len(mine), len(mine) + len(batch.number)))))
        mine += [sequences[n] for n in batch.number]
    return mine, renumbered


def _batch(sequences: Sequence[TokenSequence], group: list[int], pad: int) -> Batch:
    longest = max(len(sequences[number].ids) for number in group)
    ids = torch.full((len(group), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, number in enumerate(group):
        size = len(sequences[number].ids)
        ids[row, :size] = torch.from_numpy(sequences[number].ids)
        mask[row, :size] = True
    return Batch(tuple(group), ids, mask)


def priorities(sequence: TokenSequence, seed: int) -> np.ndarray:
    """uint64 [length]: a number per token that depends on nothing but the sequence, the position and the seed.

    The tokens with the smallest numbers are the sample. Whichever way text is divided among profiles, their merged
    sample is the sample of all of it.
    """
    digest = hashlib.blake2b(sequence.ids.tobytes(), digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    x = np.arange(1, len(sequence.ids) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= np.uint64(int.from_bytes(digest, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the splitmix64 finaliser
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
