"""Running commands in this process, and the tiny model they run on."""

import contextlib
import io

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.cli import main
from moekit.lab._tokens import byte_tokenizer

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def call(*arguments):
    """(exit code, standard output, standard error) of one command."""
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def make_model(folder, *, dense=False, seed=0, shard="5GB", **changes):
    """A random model of 2 layers with 8 experts of 2 active each, or a dense one, saved as transformers does."""
    torch.manual_seed(seed)
    if dense:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | experts | changes))
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer(128).save_pretrained(folder)
    return folder


def tree(folder):
    """Every file under a folder with its bytes' size and time of change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}
