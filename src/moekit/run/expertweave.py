"""ExpertWeave: a model and many adapters that replace experts, served in one batch from one stacked tensor.

Paper: ExpertWeave: Efficiently Serving Expert-Specialized Fine-Tuned Adapters at Scale, 2025 (n 125).
Method: per projection one tensor [M + N E_max, ..] of addresses; adapter i's e_i experts lie packed from
    D_i = M + i E_max on, and only they have pages, counted where neighbours share one. After top-k, id' = Pi[A(x), id]:
    Pi[i, j] = j, or D_i + d where j is the d-th expert that i replaces. S_i = sum_l (E_i - e_il) / (L E_i);
    F_mem = L (M + N E_max) / sum_l (M + sum_i e_il). Adapters (ESFT) replace per layer the fewest experts whose
    relevance (mean gate score, or share of the choices) adds up to p.
Uses: run._adapters, run._adapters_live, run._virtual
Differs: pages are this machine's own (4 KB; ``page`` for larger ones) in shared memory, not a device's 2 MB. Terms of a
    token are added slot by slot. Bits are those of the merged model where compiled kernels take all rows alike (fewer
    than 49 of an expert, as in decoding); elsewhere outputs agree to float accuracy.
Claim: 20 adapters add 4 to 11 % latency to the base; padding would waste 51 % (F_mem 1.51) for 10; accuracy as merged.
Shown: lab.experiments.expertweave
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from moekit.errors import OptionError
from moekit.profile import RoutingTrace
from moekit.run._adapters_live import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class ExpertWeave:
    """Room for ``adapters`` of at most ``most`` experts per layer, in pages of ``page`` bytes."""

    adapters: int = 20
    most: int = 13
    page: int = mmap.PAGESIZE

    def open(self, model: PreTrainedModel) -> AdaptedModel:
        """Move a live model's experts to where adapters can join them. Raises as :class:`AdaptedModel`."""
        return AdaptedModel(model, self.adapters, self.most, self.page)


def relevance(trace: RoutingTrace, by: Literal["gate", "token"] = "gate") -> np.ndarray:
    """float [L, E], rows adding up to 1: mean combine weight, or share of the choices, of every expert."""
    experts = max(trace.num_experts)
    value_TLK = trace.weight if by == "gate" else np.ones_like(trace.weight)
    found = np.zeros((trace.num_layers, experts))
    for layer in range(trace.num_layers):
        used = trace.expert[:, layer] >= 0
        np.add.at(found[layer], trace.expert[:, layer][used], value_TLK[:, layer][used])
    return found / found.sum(1, keepdims=True)


def select(relevance_LE: np.ndarray, p: float) -> list[list[int]]:
    """Per layer the fewest experts whose relevance adds up to ``p`` of the layer's, ascending; ties to the lower id.

    Raises:
        OptionError: a share that is not within 0 to 1.
    """
    if not 0 < p <= 1:
        raise OptionError(f"a share of relevance of {p}: expected more than 0 and at most 1")
    chosen = []
    for row_E in relevance_LE:
        order = np.argsort(-row_E, kind="stable")
        reached = np.cumsum(row_E[order]) / row_E.sum()
        count = 1 + int(np.searchsorted(reached, p - 1e-9))
        chosen.append(sorted(order[: min(count, len(order))].tolist()))
    return chosen


def fragmentation(replaced: Sequence[float]) -> float:
    """S of one adapter: the share of its place that padding is, where it ``replaced`` so many experts by layer."""
    most = max(replaced)
    return sum(most - one for one in replaced) / (len(replaced) * most)


def memory_factor(base: int, most: int, replaced: Sequence[Sequence[float]]) -> float:
    """F_mem: padded over packed, for ``replaced[i][l]`` experts of adapter i in layer l over ``base`` experts."""
    layers = len(replaced[0])
    packed = layers * base + sum(sum(one) for one in replaced)
    return layers * (base + len(replaced) * most) / packed
