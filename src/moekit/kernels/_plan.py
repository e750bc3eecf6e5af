"""Routing as the kernels want it: (token, slot) pairs sorted by expert, one stable sort shared by every product.

Shapes by suffix: T tokens, K slots, S pairs that hold an expert, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Rows that share the row-wise work: their pre-activations stay in a second-level cache."""


@dataclass(frozen=True)
class Plan:
    """``pair`` [S]: positions in the flat [T * K] routing, sorted by expert, slots of one expert in token order;
    ``token`` [S]: the token of each; ``segments``: (expert, first pair, end) of every expert that has any.
    Ids outside 0..E-1 (padding, sentinels of expert parallelism) hold no expert and are left out.
    """

    pair: Tensor
    token: Tensor
    segments: list[tuple[int, int, int]]

    @classmethod
    def of(cls, index_TK: Tensor, num_experts: int) -> Plan:
        """Moves the counts to the host: the one synchronisation of a layer."""
        tokens, slots = index_TK.shape
        flat = index_TK.reshape(-1)
        if tokens == 1 and index_TK.device.type == "cpu":
            return cls._single(flat.tolist(), num_experts)
        flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
        pair = torch.sort(flat, stable=True).indices
        counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
        segments, start = [], 0
        for expert, count in enumerate(counts[:num_experts]):
            if count:
                segments.append((expert, start, start + count))
                start += count
        pair = pair[:start]
        return cls(pair, pair // slots, segments)

    @classmethod
    def _single(cls, experts: list[int], num_experts: int) -> Plan:
        """One token: sorting a handful of ids on the host beats six calls of tensor bookkeeping."""
        used = sorted((e, k) for k, e in enumerate(experts) if 0 <= e < num_experts)
        segments: list[tuple[int, int, int]] = []
        for row, (expert, _) in enumerate(used):
            if segments and segments[-1][0] == expert:
                segments[-1] = (expert, segments[-1][1], row + 1)
            else:
                segments.append((expert, row, row + 1))
        pair = torch.tensor([k for _, k in used], dtype=torch.long)
        return cls(pair, torch.zeros_like(pair), segments)

    def chunks(self, few: int) -> Iterator[list[tuple[int, int, int]]]:
        """The segments in order: neighbours of fewer than ``few`` rows together (up to CHUNK rows), others alone.

        What is done row by row is done once per chunk: for a few rows the call costs more than the work.
        """
        chunk: list[tuple[int, int, int]] = []
        for segment in self.segments:
            _, start, stop = segment
            if chunk and (stop - start >= few or stop - chunk[0][1] > CHUNK):
                yield chunk
                chunk = []
            chunk.append(segment)
            if stop - start >= few:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def weights(self, weight_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """Combine weights [S, 1] in the order of the plan."""
        return weight_TK.reshape(-1).index_select(0, self.pair).to(dtype).unsqueeze(1)

    def combine(self, rows_SH: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, H]: each token's weighted sum of its rows; slots without an expert add nothing."""
        tokens, slots = weight_TK.shape
        if not self.segments:
            return rows_SH.new_zeros(tokens, rows_SH.shape[1])
        if tokens == 1:
            return torch.mm(self.weights(weight_TK, rows_SH.dtype).t(), rows_SH)
        row = torch.zeros(tokens * slots, dtype=torch.long, device=rows_SH.device)
        row[self.pair] = torch.arange(self.pair.numel(), device=row.device)
        weight = weight_TK.to(rows_SH.dtype)
        if self.pair.numel() < row.numel():
            used = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, self.pair, True)
            weight = weight.reshape(-1).masked_fill(~used, 0).view(tokens, slots)
        # one fused gather-multiply-sum; the same written with indexing makes a [T, K, H] copy and is 10-20x slower
        return F.embedding_bag(row.view(tokens, slots), rows_SH, mode="sum", per_sample_weights=weight)

    def scatter(self, rows_SH: Tensor, tokens: int, slots: int) -> Tensor:
        """[T, K, H]: each pair's row at its place, zero where a slot holds no expert."""
        out = rows_SH.new_zeros(tokens * slots, rows_SH.shape[1])
        return out.index_copy(0, self.pair, rows_SH).view(tokens, slots, rows_SH.shape[1])
