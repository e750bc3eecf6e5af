"""What experiments on caches and predictors share: how the embedded model routes texts, and caches tried on that.

Shapes by suffix: T tokens, L MoE layers, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.lab.experiments._seeds import interval
from moekit.lab.experiments._trial import DOMAINS
from moekit.profile import RoutingTrace, record
from moekit.run.policy import CachePolicy, policy
from moekit.run.replay import Counters, bound, replay
from moekit.stream import LoadedModel

SHARES = (0.125, 0.25, 0.5, 0.75)
LENGTH, PROMPT, SEQUENCES = 192, 32, 3
BASELINES = ("lru", "lfu", "decayed-lfu", "score-aware", "multi-term", "arc")
Make = Callable[[RoutingTrace, int], CachePolicy]


class Reader:
    """The embedded model in float32. Calibration texts are to learn from, test texts to judge on; a seed draws both."""

    def __init__(self, model: str = "moekit:mini", domains: Sequence[str] = DOMAINS) -> None:
        source = Checkpoint.open(model)
        self.model = LoadedModel.load(source, dtype=torch.float32).model
        self.blocks = blocks(self.model)
        self.tokenizer, self.domains = source.tokenizer(), tuple(domains)
        self.setting: dict[str, Any] = {
            "model": model,
            "fingerprint": source.fingerprint,
            "domains": list(domains),
            "sequence": LENGTH,
            "prompt": PROMPT,
            "texts per domain": SEQUENCES,
            "tokens": "teacher-forced: held-out texts, read as prompt and then one by one",
        }

    def rows(self, split: str, seed: int, sequences: int = SEQUENCES) -> dict[str, Sequence[torch.Tensor]]:
        """Token ids [LENGTH] by domain."""
        found: dict[str, Sequence[torch.Tensor]] = {}
        for domain in self.domains:
            text = lab.text(domain, split, 2 * sequences * LENGTH, seed)
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            found[domain] = list(ids[: sequences * LENGTH].view(sequences, LENGTH))
        return found

    def trace(self, split: str, seed: int, sequences: int = SEQUENCES, *, inputs: bool = False) -> RoutingTrace:
        """How the model routes these texts, as :func:`decoded`."""
        with torch.no_grad():
            read = record(self.model, self.rows(split, seed, sequences), inputs=inputs, scores=True)
        return decoded(read)


def decoded(trace: RoutingTrace, prompt: int = PROMPT) -> RoutingTrace:
    """The same tokens as if each sequence's first ``prompt`` were one step and every other token its own.

    A causal model routes a token alike either way.
    """
    first = np.diff(trace.sequence, prepend=-1) != 0
    position = np.arange(len(trace)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    decode = position >= prompt
    return replace(trace, decode=decode, step=np.cumsum(first | decode) - 1)


def uniform(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """The control: as many experts per token, drawn alike and anew for every token; scores are drawn with them."""
    draw = np.random.default_rng(seed)
    score_TLE = draw.random((len(trace), trace.num_layers, max(trace.num_experts)))
    expert = np.argsort(-score_TLE, axis=2)[:, :, : trace.expert.shape[2]].astype(np.int32)
    return replace(trace, expert=expert, scores=(score_TLE / score_TLE.sum(2, keepdims=True)).astype(np.float16))


def one_layer(trace: RoutingTrace, layer: int) -> RoutingTrace:
    """That layer alone."""
    own = slice(layer, layer + 1)
    return replace(
        trace,
        expert=trace.expert[:, own],
        weight=trace.weight[:, own],
        num_experts=trace.num_experts[own],
        scores=None if trace.scores is None else trace.scores[:, own],
        inputs=None,
    )


def capacity(trace: RoutingTrace, share: float) -> int:
    """Experts that a share of all is."""
    return round(share * sum(trace.num_experts))


def tried(trace: RoutingTrace, share: float, more: Mapping[str, Make] | None = None) -> dict[str, Counters]:
    """Decoding through the usual policies, the bound, and ``more``, at one share of capacity."""
    room = capacity(trace, share)
    found = {name: replay(trace, policy(name), room, phase="decode") for name in BASELINES}
    found |= {name: replay(trace, make(trace, room), room, phase="decode") for name, make in (more or {}).items()}
    return found | {"belady": bound(trace, room, phase="decode")}


def gap(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """First minus second, paired by seed."""
    return interval([a - b for a, b in zip(first, second, strict=True)])
