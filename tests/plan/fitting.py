"""Tiny models for the tests of fit, which differ in sizes and in what their weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from moekit import lab
from moekit.checkpoint import Checkpoint

SIZES = {
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 264,
}


def tiny(path: Path, fill: Callable[[str, nn.Parameter], object], **sizes: int) -> Checkpoint:
    """A model saved at ``path`` with the embedded model's tokenizer; ``fill(name, weight)`` sees every parameter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **sizes), dtype=torch.float32)
    for name, weight in model.named_parameters():
        fill(name, weight)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(lab.mini()).save_pretrained(path)
    return Checkpoint.open(path)
