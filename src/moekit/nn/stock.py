"""A :class:`MoekitForCausalLM` as a checkpoint of the stock family that computes the same, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoint.stock_families import Architecture, Sibling, sibling
from ..errors import OutputError, UnsupportedModelError
from .config import MoekitConfig
from .model import MoekitForCausalLM
from .router import DEFAULTS

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit: other orders of the same sums in float32."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_PLAIN: Mapping[str, Any] = {
    "wiring": "residual",
    "block": "sequential",
    "feed_forward": "moe",
    "memory": None,
    "attention": "softmax",
    "experts": "stacked",
    "layers_per_bank": 1,
}


def export(folder: str | Path, output: Path, *, overwrite: bool = False) -> Path:
    """Write the stock checkpoint of a saved model; its logits on random tokens are compared before it gets its name.

    Raises:
        UnsupportedModelError: no stock family has this architecture, and which part none has.
        OutputError: the output exists, or the stock model's logits differ.
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
    model = MoekitForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = sibling(architecture(model.config))
    work = output.with_name(f".{output.name}.export")
    shutil.rmtree(work, ignore_errors=True)
    stock = AutoModelForCausalLM.from_config(found.config, dtype=torch.float32).eval()
    stock.load_state_dict(dict(renamed(model.state_dict(), found)))
    stock.save_pretrained(work)
    off = difference(model, AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32).eval())
    if off > TOLERANCE:
        shutil.rmtree(work)
        raise OutputError(f"the stock model's logits differ by {off:.1e} of the largest: nothing was written")
    if (Path(folder) / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(folder).save_pretrained(work)
    if output.exists():
        shutil.rmtree(output)
    return work.replace(output)


def architecture(config: MoekitConfig) -> Architecture:
    """What of a configuration stock families know.

    Raises :class:`UnsupportedModelError` that names the first part they do not.
    """
    for name, plain in _PLAIN.items():
        if getattr(config, name) != plain:
            raise UnsupportedModelError(f"no stock family has {name} = {getattr(config, name)!r}")
    if config.others:
        raise UnsupportedModelError(f"no stock family has experts of the kinds {config.others}")
    counts = config.num_experts, config.num_experts_per_tok
    if not isinstance(counts[0], int) or not isinstance(counts[1], int):
        raise UnsupportedModelError("no stock family has numbers of experts, or of slots, that differ between layers")
    parts = {name: _table(spec) for name, spec in (DEFAULTS | (config.router or {})).items()}
    known = {"score": ["linear"], "select": ["top-k"], "granularity": ["token"], "activation": ["softmax", "sigmoid"]}
    known["weigh"] = ["scores", "chosen"]
    allowed = {"weigh": {"normalise", "scale"}}
    for name, part in parts.items():
        strange = set(part) - {"kind"} - allowed.get(name, set())
        if part["kind"] not in known[name] or strange:
            raise UnsupportedModelError(f"no stock family has a router with {name} = {part!r}")
    over_chosen = parts["weigh"]["kind"] == "chosen"
    if over_chosen and parts["activation"]["kind"] != "softmax":
        raise UnsupportedModelError("no stock family weighs by a softmax over the chosen and ranks by a sigmoid")
    return Architecture(
        sizes={name: getattr(config, name) for name in _SIZES},
        num_experts=counts[0],
        top_k=counts[1],
        expert_size=config.moe_intermediate_size,
        qk_norm=config.qk_norm,
        scores=parts["activation"]["kind"],
        normalise=over_chosen or parts["weigh"].get("normalise", True),
        scale=parts["weigh"].get("scale", 1.0),
        corrected=config.correction is not None,
        shared_size=config.shared_expert_intermediate_size,
        dense_layers=tuple(sorted(config.dense_layers or ())),
        dense_size=config.intermediate_size,
    )


def _table(spec: Any) -> dict[str, Any]:
    return {"kind": spec} if isinstance(spec, str) else dict(spec)


def renamed(state: Mapping[str, Tensor], found: Sibling) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the family's names."""
    names = {"gate.scorer.weight": found.gate, "gate.bias": found.bias}
    for name, tensor in state.items():
        before, mlp, rest = name.partition("mlp.")
        if rest.startswith("shared_expert."):
            rest = rest.replace("shared_expert", found.shared or "shared_expert", 1)
        called = names.get(rest, rest)
        if called is not None and not called.startswith("correction."):
            yield f"{before}{mlp}{called}", tensor
    if found.bias is not None and not any(name.endswith("gate.bias") for name in state):
        for name, tensor in state.items():
            if name.endswith("gate.scorer.weight"):
                yield name.replace("gate.scorer.weight", found.bias), torch.zeros(len(tensor))


@torch.no_grad()
def difference(model: Any, other: Any) -> float:
    """The largest difference of logits on random tokens, relative to the largest logit."""
    ids = torch.randint(0, model.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    one, two = (m(input_ids=ids, use_cache=False).logits for m in (model, other))
    return float((one - two).abs().max() / one.abs().max())
