"""Figures of an embedded model on test splits: bits per byte, exact match, and how experts divide the domains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit import lab
from moekit.lab._tokens import byte_tokenizer
from moekit.measure import bits_per_byte, exact_match

Figures = dict[str, Any]


@dataclass(frozen=True)
class Live:
    """A model in memory as `measure` wants it."""

    model: PreTrainedModel

    def forward(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        """Logits [B, S, V] of each batch."""
        for batch in batches:
            yield self.model(**batch, use_cache=False).logits


@torch.no_grad()
def expert_counts(model: PreTrainedModel, data: bytes, context: int) -> np.ndarray:
    """Return how many (token, slot) pairs each expert of each layer got: [L, E]."""
    count = len(data) // context
    ids = torch.tensor(np.frombuffer(data[: count * context], dtype=np.uint8).astype(np.int64)).view(count, context)
    router_logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    chosen = [logits.topk(top_k, dim=-1).indices.reshape(-1) for logits in router_logits]
    return np.stack([torch.bincount(index, minlength=experts).numpy() for index in chosen])


def mutual_information(counts_DE: np.ndarray) -> float:
    """Return I(domain; expert) in bits, each domain weighing the same."""
    joint = counts_DE / counts_DE.sum(1, keepdims=True) / len(counts_DE)
    independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    safe = np.where(joint > 0, joint, 1.0)
    return float((joint * np.log2(safe / np.where(joint > 0, independent, 1.0))).sum())


def specialisation(model: PreTrainedModel, context: int, max_bytes: int) -> Figures:
    """Return, per layer, how experts divide the domains, and the extremes of the load (1 = even).

    `mutual_information_bits` is I(domain; expert). `preference` is, in the mean over experts, how many times more often
    an expert is chosen in the domain that likes it most than over all domains; 1 = no specialisation.
    """
    texts = [lab.text(domain, "test", max_bytes).encode() for domain in lab.DOMAINS]
    counts = np.stack([expert_counts(model, data, context) for data in texts])
    share = counts / counts.sum(-1, keepdims=True)
    load = share.mean(0) * counts.shape[-1]
    preference = (share.max(0) / np.maximum(share.mean(0), 1e-9)).mean(-1)
    return {
        "mutual_information_bits": [round(mutual_information(counts[:, layer]), 3) for layer in range(counts.shape[1])],
        "preference": [round(float(x), 2) for x in preference],
        "max_load": [round(float(x), 2) for x in load.max(1)],
        "min_load": [round(float(x), 3) for x in load.min(1)],
    }


def evaluate(model: PreTrainedModel, *, context: int, max_bytes: int = 16_384, examples: int = 200) -> Figures:
    """Return every figure of a model, on the test splits."""
    was_training = model.training
    model.eval()
    runner, tokenizer = Live(model), byte_tokenizer(context)
    texts = {domain: [lab.text(domain, "test", max_bytes)] for domain in lab.DOMAINS}
    bits = bits_per_byte(runner, texts, tokenizer, length=context, batch_size=16)
    exact = {
        name: exact_match(runner, tokenizer, lab.examples(name, "test", examples), batch_size=32) for name in lab.TASKS
    }
    figures: Figures = {
        "bits_per_byte": {domain: round(interval.mean, 3) for domain, interval in bits.items()},
        "exact_match": {name: round(interval.mean, 3) for name, interval in exact.items()},
    }
    if hasattr(model.config, "num_experts"):
        figures["experts"] = specialisation(model, context, max_bytes // 2)
    model.train(was_training)
    return figures
