"""Packed training sequences: a row is one domain, drawn from (seed, step), so that any step can be replayed."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moekit.lab._recipe import Recipe
from moekit.lab._tokens import EOS_ID
from moekit.lab.tasks import TASKS, stream
from moekit.lab.texts import TEXTS, documents


def text_tokens(domain: str, split: str) -> np.ndarray:
    """Return the documents of a split as int16 byte tokens, an end-of-sequence token after each."""
    parts = []
    for _, text in documents(domain, split):
        parts += [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int16), np.array([EOS_ID], dtype=np.int16)]
    return np.concatenate(parts)


LONGEST_SKIP = 64


def task_row(
    name: str, split: str, seed: int, length: int, prompt_weight: float, unaligned: float = 0.0
) -> tuple[bytes, list[float]]:
    """Return `length` bytes of example lines and the loss weight of each byte: 1 on answers and their newline.

    With probability `unaligned` the row begins anywhere, else with a prompt.
    """
    rng = np.random.default_rng(seed)
    skip = int(rng.integers(LONGEST_SKIP)) if rng.random() < unaligned else 0
    row, weight = b"", []
    source = stream(name, split, seed)
    while len(row) < length + skip:
        prompt, answer = next(source)
        row += f"{prompt}{answer}\n".encode()
        weight += [prompt_weight] * len(prompt) + [1.0] * (len(answer) + 1)
    return row[skip : length + skip], weight[skip : length + skip]


@dataclass(frozen=True)
class Batches:
    """The training mixture of a recipe."""

    recipe: Recipe

    @cached_property
    def _tokens(self) -> dict[str, np.ndarray]:
        return {
            domain: text_tokens(domain, "train")
            for domain in TEXTS
            if any(domain in phase.mixture for phase in self.recipe.phases)
        }

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids [B, S + 1] and loss weights [B, S] (of predicting ids 1..S) of one step."""
        recipe, length = self.recipe, self.recipe.context_at(step) + 1
        rng = np.random.default_rng((recipe.seed, step))
        rows = recipe.tokens_per_step // (length - 1)
        phase = recipe.phase_at(step)
        mixture = phase.mixture
        shares = np.array(list(mixture.values()))
        names = rng.choice(list(mixture), size=rows, p=shares / shares.sum())
        ids = np.empty((rows, length), dtype=np.int64)
        weight = np.ones((rows, length), dtype=np.float32)
        for i, name in enumerate(names.tolist()):
            draw = int(rng.integers(2**31))
            if name in TASKS:
                row, weight[i] = task_row(name, "train", draw, length, recipe.prompt_weight, phase.unaligned)
                ids[i] = np.frombuffer(row, dtype=np.uint8)
            else:
                start = draw % (len(self._tokens[name]) - length)
                ids[i] = self._tokens[name][start : start + length]
        return torch.from_numpy(ids), torch.from_numpy(weight[:, 1:].copy())
