"""DeepSpeed MoE for many tasks: expert times data parallelism, random token selection, experts of two models in one.

Paper: Scalable and Efficient MoE Training for Multitask Multilingual Models, 2021 (n 75, arXiv 2109.10465).
Method: experts are spread inside groups of ranks and replicated across groups; gradients of an expert are summed over
    the ranks that store it, the others over all. Random token selection: of the slots routed to an expert beyond its
    capacity C = factor T K / E, a random C are kept, where the usual rule keeps the first in order (training only).
    Aggregation: a model of 2E experts from two of E, experts and router rows side by side, then trained on. Pruning:
    the experts used least on validation text are dropped, then a short fine-tuning.
Uses: parallel._groups (attach(degree=)), parallel._capacity, parallel._aggregate; pruning is compress.frequency
Differs: slots of all choices draw alike, and a dropped token's other slots are normalised without it. Everything that
    is no expert is taken from the first of the two models, or weighed. ZeRO and offload of optimiser state are
    elsewhere (hecate, se-moe), tensor parallelism is not here.
Claim: models 8x larger on the same hardware; random token selection converges better; 10B parameters, 50 languages.
Shown: lab.experiments.ds_moe_multitask
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moekit.blocks import MoEBlock
from moekit.parallel._aggregate import aggregate
from moekit.parallel._capacity import dropping


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """``factor`` and ``least`` give the capacity; with ``random`` off the first in order are kept, the usual rule."""

    factor: float = 1.0
    least: int = 4
    random: bool = True
    seed: int = 0

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[list[MoEBlock]]:
        """While open, blocks that are in training mode drop tokens. Raises ParallelError for the factor."""
        draw = torch.Generator().manual_seed(self.seed) if self.random else None
        with dropping(model, self.factor, least=self.least, draw=draw) as found:
            yield found


__all__ = ["RandomTokens", "aggregate"]
