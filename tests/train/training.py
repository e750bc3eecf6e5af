"""Tiny models and token rows to train on."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}

TINY_RECIPE = """
[model]
vocab_size = 40
pad_token_id = 0
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 8
correction = {rate = 0.01}
[train]
batch = 4
length = 12
"""


def strong(model):
    """Weights of the feed-forward layers large enough to matter to the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(12)
    return model


def sparse(seed=0, **changes):
    """Two layers of four experts, top-2."""
    torch.manual_seed(seed)
    return strong(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | EXPERTS | changes)))


def dense(seed=0, **changes):
    """Two dense layers."""
    torch.manual_seed(seed)
    return strong(Qwen3ForCausalLM(Qwen3Config(**SIZES | changes)))


def rows(count=12, length=10, seed=0):
    """Random token rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (length,), generator=generator) for _ in range(count)]


def states_equal(one, other):
    """Whether all tensors of two models are the same bits."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
