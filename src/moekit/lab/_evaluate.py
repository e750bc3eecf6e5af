"""Figures of an embedded model on test splits: bits per byte, exact match, and how experts divide the domains."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from moekit import lab
from moekit.lab._tokens import PAD_ID

Figures = dict[str, Any]


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, data: bytes, context: int) -> float:
    """Return bits per predicted byte over windows of `context` bytes that do not overlap (the first byte is given)."""
    count = len(data) // context
    ids = torch.tensor(np.frombuffer(data[: count * context], dtype=np.uint8).astype(np.int64)).view(count, context)
    total = 0.0
    for rows in ids.split(16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].reshape(-1), reduction="sum").item()
    return total / (count * (context - 1)) / math.log(2)


@torch.no_grad()
def exact_match(model: PreTrainedModel, examples: list[lab.Example]) -> float:
    """Return the share of prompts that greedy decoding answers exactly, newline included.

    Greedy decoding gives the answer if and only if each of its bytes is the most likely one after the true bytes
    before it, so one forward pass with the answer in place decides it.
    """
    right = 0
    for start in range(0, len(examples), 64):
        group = [(prompt.encode(), f"{answer}\n".encode()) for prompt, answer in examples[start : start + 64]]
        width = max(len(prompt) + len(answer) for prompt, answer in group)
        ids = torch.full((len(group), width), PAD_ID)
        for i, (prompt, answer) in enumerate(group):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(list(prompt + answer))
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for i, (prompt, answer) in enumerate(group):
            right += best[i, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == list(answer)
    return right / len(examples)


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
    """Return, per layer, the mutual information of expert and domain and the extremes of the load (1 = even)."""
    texts = [lab.text(domain, "test", max_bytes).encode() for domain in lab.DOMAINS]
    counts = np.stack([expert_counts(model, data, context) for data in texts])
    share = counts / counts.sum(-1, keepdims=True)
    load = share.mean(0) * counts.shape[-1]
    return {
        "mutual_information_bits": [round(mutual_information(counts[:, layer]), 3) for layer in range(counts.shape[1])],
        "max_load": [round(float(x), 2) for x in load.max(1)],
        "min_load": [round(float(x), 3) for x in load.min(1)],
    }


def evaluate(model: PreTrainedModel, *, context: int, max_bytes: int = 16_384, examples: int = 200) -> Figures:
    """Return every figure of a model, on the test splits."""
    was_training = model.training
    model.eval()
    figures: Figures = {
        "bits_per_byte": {
            domain: round(bits_per_byte(model, lab.text(domain, "test", max_bytes).encode(), context), 3)
            for domain in lab.DOMAINS
        },
        "exact_match": {name: round(exact_match(model, lab.examples(name, "test", examples)), 3) for name in lab.TASKS},
    }
    if hasattr(model.config, "num_experts"):
        figures["experts"] = specialisation(model, context, max_bytes // 2)
    model.train(was_training)
    return figures
