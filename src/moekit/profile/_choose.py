"""Which tokens become samples and traces, decided before anything runs, and what each token counts towards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moekit.profile._sequences import Batch, TokenSequence, priorities
from moekit.profile._view import Cells
from moekit.profile.document import Tokens
from moekit.profile.schema import PHASES

_DECODE = PHASES.index("decode")


@dataclass(frozen=True)
class Chosen:
    """``sample_row`` and ``trace_row``: sequence -> row per position, -1 where the token is not kept."""

    sample: Tokens
    trace: Tokens
    sample_row: dict[int, np.ndarray]
    trace_row: dict[int, np.ndarray]


def choose(sequences: Sequence[TokenSequence], *, sample: int, trace: int, decode: int, seed: int) -> Chosen:
    """At most ``sample`` tokens by priority; whole sequences in order (domains in turn) up to ``trace`` tokens."""
    sampled, sample_row = _sample(sequences, sample, seed)
    traced, trace_row = _trace(sequences, trace, decode)
    return Chosen(sampled, traced, sample_row, trace_row)


def _sample(sequences: Sequence[TokenSequence], bound: int, seed: int) -> tuple[Tokens, dict[int, np.ndarray]]:
    if bound <= 0:
        return Tokens(), {}
    sizes = [len(s.ids) for s in sequences]
    priority = np.concatenate([priorities(s, seed) for s in sequences])
    number = np.repeat(np.arange(len(sequences)), sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    rows: dict[int, np.ndarray] = {}
    best = np.argsort(priority, kind="stable")[:bound]
    for row, token in enumerate(best.tolist()):
        rows.setdefault(int(number[token]), np.full(sizes[number[token]], -1))[position[token]] = row
    domain = np.array([sequences[n].domain for n in number[best]], dtype=np.int32)
    return Tokens({"priority": priority[best], "domain": domain}), rows


def _trace(sequences: Sequence[TokenSequence], bound: int, decode: int) -> tuple[Tokens, dict[int, np.ndarray]]:
    turn: dict[int, int] = {}
    order = []
    for number, sequence in enumerate(sequences):
        turn[sequence.domain] = turn.get(sequence.domain, 0) + 1
        order.append((turn[sequence.domain], sequence.domain, number))
    rows: dict[int, np.ndarray] = {}
    columns: dict[str, list[np.ndarray]] = {"sequence": [], "position": [], "domain": [], "phase": []}
    used = 0
    for _, domain, number in sorted(order):
        length = len(sequences[number].ids)
        if used + length + decode > bound:
            break
        rows[number] = np.arange(used, used + length + decode)
        position = np.arange(length + decode)
        columns["position"].append(position)
        columns["sequence"].append(np.full_like(position, len(rows) - 1))
        columns["domain"].append(np.full_like(position, domain))
        columns["phase"].append((position >= length).astype(position.dtype))
        used += length + decode
    return Tokens({k: np.concatenate(v).astype(np.int32) for k, v in columns.items()} if rows else {}), rows


def prefill_cells(batch: Batch, sequences: Sequence[TokenSequence], chosen: Chosen, num_domains: int) -> Cells:
    """Cells of a batch's tokens as they lie, row by row; -1 at padding."""
    cell = torch.full(batch.ids.shape, -1, dtype=torch.int64)
    for row, number in enumerate(batch.number):
        sequence = sequences[number]
        cell[row, : len(sequence.ids)] = Cells.number(sequence.half, sequence.domain, 0, num_domains)
    return Cells(cell.flatten(), _rows(batch, chosen.sample_row), _rows(batch, chosen.trace_row))


def decode_cells(
    batch: Batch, sequences: Sequence[TokenSequence], chosen: Chosen, num_domains: int, step: int, alive: Sequence[bool]
) -> Cells:
    """Cells of the tokens generated at ``step`` (from 0), one per sequence; -1 for sequences that have ended."""
    cell, position, rows = [], [], []
    for row, number in enumerate(batch.number):
        sequence = sequences[number]
        cell.append(Cells.number(sequence.half, sequence.domain, _DECODE, num_domains) if alive[row] else -1)
        if alive[row] and number in chosen.trace_row:
            position.append(row)
            rows.append(int(chosen.trace_row[number][len(sequence.ids) + step]))
    return Cells(torch.tensor(cell), trace=(position, rows))


def _rows(batch: Batch, wanted: dict[int, np.ndarray]) -> tuple[list[int], list[int]]:
    """(position in the flattened batch, row in the result) of the tokens to keep."""
    positions: list[int] = []
    rows: list[int] = []
    width = batch.ids.shape[1]
    for row, number in enumerate(batch.number):
        if number in wanted:
            kept = wanted[number][: int(batch.mask[row].sum())]
            at = np.flatnonzero(kept >= 0)
            positions += (row * width + at).tolist()
            rows += kept[at].tolist()
    return positions, rows
