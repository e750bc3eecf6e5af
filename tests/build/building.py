"""A tiny dense model on disk, and rows to train on."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def dense(seed=0, cls=Qwen3ForCausalLM, config=Qwen3Config, **changes):
    """Three layers whose feed-forward weights matter to the logits."""
    torch.manual_seed(seed)
    model = cls(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(12)
    return model


def rows(count=12, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (length,), generator=generator) for _ in range(count)]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.stack(rows(2)), use_cache=False).logits
