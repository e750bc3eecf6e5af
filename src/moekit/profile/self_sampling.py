"""Text that a model writes itself, likely by its own judgement and using its experts evenly: expert-balanced
self-sampling (EBSS), from MoEQuant: Enhancing Quantization for Mixture-of-Experts Large Language Models, 2025 (n 87).

For every prefix c and next token v, ``cost = -(log P(c) + log p(v | c)) / (len(c) + 1) + sigma(c) / tau``, and a beam
keeps those of least cost; sigma is the imbalance of the experts that c used, mean over layers (v's routing is not known
before it is fed). The published pseudo-code ends with an argmax of what is a cost; here the least is taken.
A likely text repeats itself, and nothing in the paper forbids it: :class:`Degeneracy` says how much it does, and
``no_repeat`` (moekit's own) forbids it.
Shapes by suffix: G sequences written together, B beams of each, V vocabulary, R = G x B rows.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError
from moekit.profile._writer import ROWS, Writer, usual_tokens
from moekit.profile.degeneracy import Degeneracy, degeneracy
from moekit.stream import LoadedModel, open_model

SELF_DOMAIN = "self"
"""The domain that self-sampled text is profiled as."""

Progress = Callable[[int, int], None]


@torch.no_grad()
def self_sample(
    model: PreTrainedModel,
    *,
    sequences: int = 128,
    length: int = 512,
    width: int = 4,
    tau: float = 1.2,
    seed: int = 0,
    no_repeat: int = 0,
    allowed: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """``sequences`` arrays of ``length`` token ids (int64), each begun by a token drawn at random.

    Args:
        width: beams per sequence. tau: the larger, the less balance counts (1.0 to 1.5 in the paper).
        no_repeat: no run of this many tokens occurs twice in a sequence, unless nothing else is left; 0 allows all.
        allowed: ids that may occur; None for all but those that begin, end or pad a text.
        progress: told (tokens done, tokens in all).

    Raises:
        OptionError: a setting out of range. UnsupportedModelError: the model keeps no cache that beams can share.
    """
    ids = _check(model, sequences, length, width, tau, no_repeat, allowed)
    first = torch.from_numpy(np.random.default_rng(seed).choice(ids, sequences)).long()
    banned_V = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)
    banned_V[ids] = False
    found: list[np.ndarray] = []
    for part in first.split(max(1, ROWS // width)):
        with Writer(model) as writer:
            found.extend(_beams(writer, part, length, width, tau, banned_V, no_repeat).numpy())
        if progress is not None:
            progress(len(found) * length, sequences * length)
    return found


def _beams(
    writer: Writer, first_G: Tensor, length: int, width: int, tau: float, banned_V: Tensor, no_repeat: int
) -> Tensor:
    """The least costly sequences [G, length] that begin with these tokens."""
    count = len(first_G)
    text_GBT, likely_GB = first_G[:, None, None], torch.zeros(count, 1, dtype=torch.float64)
    for size in range(1, length):
        beams = text_GBT.shape[1]
        next_GBV = writer.step(text_GBT[:, :, -1].flatten()).view(count, beams, -1).double()
        banned_GBV = _banned(text_GBT.flatten(0, 1), banned_V, no_repeat).view_as(next_GBV)
        next_GBV = next_GBV.masked_fill(banned_GBV, -math.inf) + likely_GB[..., None]
        cost_GBV = -next_GBV / (size + 1) + writer.imbalance().view(count, beams, 1) / tau
        wanted = min(width, beams * int((~banned_V).sum())) if size + 1 < length else 1
        best_GB = cost_GBV.flatten(1).topk(wanted, largest=False).indices
        beam_GB, token_GB = best_GB // len(banned_V), best_GB % len(banned_V)
        likely_GB = next_GBV.flatten(1).gather(1, best_GB)
        text_GBT = text_GBT.gather(1, beam_GB[..., None].expand(-1, -1, size))
        text_GBT = torch.cat([text_GBT, token_GB[..., None]], dim=2)
        if size + 1 < length:
            writer.choose_rows((torch.arange(count)[:, None] * beams + beam_GB).flatten())
    return text_GBT[:, 0]


def _banned(text_RT: Tensor, banned_V: Tensor, no_repeat: int) -> Tensor:
    """bool [R, V]: tokens that may not come next in each row."""
    banned_RV = banned_V.expand(len(text_RT), -1)
    if not 0 < no_repeat <= text_RT.shape[1]:
        return banned_RV
    runs = text_RT.unfold(1, no_repeat, 1)
    begun_RW = (runs[..., :-1] == text_RT[:, None, text_RT.shape[1] - no_repeat + 1 :]).all(-1)
    row, window = begun_RW.nonzero(as_tuple=True)
    more_RV = banned_RV.clone()
    more_RV[row, runs[row, window, -1]] = True
    return torch.where(more_RV.all(1, keepdim=True), banned_RV, more_RV)


def self_sampled_texts(
    model: str | os.PathLike[str] | Checkpoint | LoadedModel,
    size: str = "128x512",
    *,
    width: int = 4,
    tau: float = 1.2,
    seed: int = 0,
    no_repeat: int = 0,
    device: str = "auto",
    max_ram: int | float | str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, list[np.ndarray]], Degeneracy]:
    """What :func:`moekit.profile.profile` takes as texts, and how it compares with text drawn plainly.

    ``size`` is sequences x tokens in each, such as "32x128". Raises OptionError where it is not, or where the model
    does not fit into memory (beams need it whole), besides what :func:`self_sample` raises.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", size)
    if match is None:
        raise OptionError(f"'{size}' is no size of self-sampled text: give sequences x tokens, such as 32x128")
    runner = model if isinstance(model, LoadedModel) else open_model(model, device, max_ram)
    if not isinstance(runner, LoadedModel):
        raise OptionError("self-sampling needs the model in memory: raise the memory cap, or give text")
    number, length = int(match[1]), int(match[2])
    found = self_sample(
        runner.model, sequences=number, length=length, width=width, tau=tau, seed=seed,
        no_repeat=no_repeat, allowed=_known_tokens(runner), progress=progress,
    )  # fmt: skip
    return {SELF_DOMAIN: found}, degeneracy(runner.model, found, seed)


def _known_tokens(runner: LoadedModel) -> list[int]:
    """Ordinary ids that the tokenizer knows: vocabularies are often padded with ids that stand for nothing."""
    usual = usual_tokens(runner.model)
    if runner.checkpoint is None:
        return usual
    tokenizer = runner.checkpoint.tokenizer()
    special = set(tokenizer.all_special_ids)
    return [token for token in usual if token < len(tokenizer) and token not in special]


def _check(
    model: PreTrainedModel,
    sequences: int,
    length: int,
    width: int,
    tau: float,
    no_repeat: int,
    allowed: Sequence[int] | None,
) -> list[int]:
    """The ids that may occur."""
    limits = {"sequences": (sequences, 1), "length": (length, 2), "width": (width, 1), "no_repeat": (no_repeat, 0)}
    for name, (value, least) in limits.items():
        if value < least:
            raise OptionError(f"{name} is {value}: self-sampling needs at least {least}")
    if not tau > 0:
        raise OptionError(f"tau is {tau}: give a number above 0 (1.2 is usual; the larger, the less balance counts)")
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest > 0:
        raise OptionError(f"length is {length}, but the model reads {longest} tokens at most: give fewer")
    ids = usual_tokens(model) if allowed is None else sorted({int(token) for token in allowed})
    if not ids or ids[0] < 0 or ids[-1] >= config.vocab_size:
        raise OptionError(f"allowed tokens must be some of 0 to {config.vocab_size - 1}")
    return ids
