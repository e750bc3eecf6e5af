"""How far text that a model wrote itself is from text drawn plainly from it: repetition, and use of the experts.

Shapes by suffix: R rows (sequences), T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from moekit.blocks import Observation, blocks
from moekit.profile._writer import ROWS, Writer, usual_tokens
from moekit.stream import LoadedModel


@torch.no_grad()
def plain_sample(model: PreTrainedModel, first: Sequence[int], length: int, seed: int = 0) -> list[np.ndarray]:
    """One sequence after each first token, every next token drawn from the model's own distribution."""
    banned_V = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)
    banned_V[usual_tokens(model)] = False
    draw = torch.Generator().manual_seed(seed)
    found: list[np.ndarray] = []
    for part in torch.tensor(list(first), dtype=torch.int64).split(ROWS):
        text_RT = part[:, None]
        with Writer(model) as writer:
            for _ in range(1, length):
                likely_RV = writer.step(text_RT[:, -1]).masked_fill(banned_V, -math.inf)
                text_RT = torch.cat([text_RT, torch.multinomial(likely_RV.exp(), 1, generator=draw)], dim=1)
        found.extend(text_RT.numpy())
    return found


@dataclass(frozen=True)
class Degeneracy:
    """What self-sampled text lacks, beside text drawn plainly from the model after the same first tokens.

    ``distinct``: share of different ones among the n-grams of a sequence, n = 1, 2, 3, mean over sequences (1: nothing
    ever repeats). ``usage_std``: standard deviation over experts of their shares of all tokens, mean over layers.
    """

    distinct: tuple[float, float, float]
    plain_distinct: tuple[float, float, float]
    usage_std: float
    plain_usage_std: float

    @property
    def degenerate(self) -> bool:
        """Whether pairs of tokens differ less than half as often as in plainly drawn text."""
        return self.distinct[1] < self.plain_distinct[1] / 2

    @property
    def balanced(self) -> bool:
        """Whether the experts were used more evenly than by plainly drawn text."""
        return self.usage_std < self.plain_usage_std


def degeneracy(model: PreTrainedModel, sequences: Sequence[np.ndarray], seed: int = 0) -> Degeneracy:
    """Hold self-sampled sequences of one length against as many drawn plainly."""
    plain = plain_sample(model, [int(ids[0]) for ids in sequences], len(sequences[0]), seed)
    return Degeneracy(_distinct(sequences), _distinct(plain), usage_std(model, sequences), usage_std(model, plain))


def usage_std(model: PreTrainedModel, sequences: Sequence[np.ndarray]) -> float:
    """Standard deviation over experts of their shares of all (token, slot) pairs, mean over layers."""
    seen = blocks(model, shared=True)
    used = [torch.zeros(block.num_experts, dtype=torch.float64) for block in seen]

    def count(index: int, observation: Observation) -> None:
        used[index] += observation.routing.counts(seen[index].num_experts).cpu()

    texts = [{"input_ids": torch.from_numpy(ids)[None]} for ids in sequences]
    with ExitStack() as stack:
        for index, block in enumerate(seen):
            stack.enter_context(block.observe(partial(count, index)))
        for _ in LoadedModel(model).forward(texts, logits=False):
            pass
    return float(np.mean([float((each / each.sum()).std(correction=0)) for each in used]))


def _distinct(sequences: Sequence[np.ndarray]) -> tuple[float, float, float]:
    def share(n: int) -> float:
        grams = [[tuple(ids[i : i + n].tolist()) for i in range(len(ids) - n + 1)] for ids in sequences]
        return float(np.mean([len(set(each)) / len(each) if each else 1.0 for each in grams]))

    return share(1), share(2), share(3)
