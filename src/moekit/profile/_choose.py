"""Which tokens are traced, decided before anything runs, how they rank for the sample, and what each counts towards."""

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
    """``trace_row``: sequence -> row per position; ``seed``: of the priorities, None where nothing is sampled."""

    trace: Tokens
    trace_row: dict[int, np.ndarray]
    seed: int | None = None


def choose(sequences: Sequence[TokenSequence], *, sample: int, trace: int, decode: int, seed: int) -> Chosen:
    """Whole sequences in order (domains in turn) up to ``trace`` tokens; priorities if any are to be sampled."""
    return Chosen(*_trace(sequences, trace, decode), seed if sample else None)


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
    priority = np.zeros(batch.ids.shape, dtype=np.uint64)
    for row, number in enumerate(batch.number):
        sequence = sequences[number]
        cell[row, : len(sequence.ids)] = Cells.number(sequence.half, sequence.domain, 0, num_domains)
        if chosen.seed is not None:
            priority[row, : len(sequence.ids)] = priorities(sequence, chosen.seed)
    ranked = None if chosen.seed is None else priority.flatten()
    return Cells(cell.flatten(), ranked, _rows(batch, chosen.trace_row))


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
