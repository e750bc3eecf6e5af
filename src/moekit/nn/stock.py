"""A :class:`MoekitForCausalLM` as a checkpoint of the stock family that computes the same, where there is one.

A choice limited to groups of experts is carried by the families whose configuration has groups and whose attention is
plain. The one it comes from is not among them: its attention norms compressed keys and values, which no plain one does.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..checkpoint import Checkpoint
from ..checkpoint.stock_families import Architecture, Sibling, sibling
from ..errors import CheckpointError, MoekitError, OutputError, UnsupportedModelError
from .activations import ACTIVATIONS
from .banks import BANKS
from .block import BLOCKS
from .config import MoekitConfig
from .granularity import GRANULARITIES
from .mixers import ATTENTIONS
from .model import MoekitForCausalLM
from .parts import Spec
from .router import DEFAULTS
from .scorers import SCORERS
from .selectors import SELECTORS
from .sublayers import FEED_FORWARDS
from .weighers import WEIGHERS
from .wiring import WIRINGS

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
_PLAIN: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "wiring": (WIRINGS, "residual"),
    "block": (BLOCKS, "sequential"),
    "attention": (ATTENTIONS, "softmax"),
    "experts": (BANKS, "stacked"),
}
_ROUTER: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "score": (SCORERS, ("linear",), ("frozen",)),
    "activation": (ACTIVATIONS, ("softmax", "sigmoid"), ()),
    "select": (SELECTORS, ("top-k", "group-limited"), ("k", "groups", "keep")),
    "weigh": (WEIGHERS, ("scores", "chosen"), ("normalise", "scale")),
    "granularity": (GRANULARITIES, ("token",), ()),
}
"""Of each part of a router: its table, the kinds that families have, and which of their options may have any value."""


def export(folder: str | Path, output: Path, *, overwrite: bool = False) -> Path:
    """Write the stock checkpoint of a saved model; its logits on random tokens are compared before it gets its name.

    Raises:
        CheckpointError: no model, or weights that are not those its configuration asks for.
        UnsupportedModelError: no stock family has this architecture, and which part none has.
        OutputError: the output exists, or the stock model's logits differ.
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
    checkpoint = Checkpoint.open(folder)
    if checkpoint.model_type != MoekitConfig.model_type:
        raise UnsupportedModelError(f"{folder} is a stock {checkpoint.model_type} checkpoint already")
    check(checkpoint)
    found = sibling(architecture(checkpoint.transformers_config))
    model = MoekitForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    work = output.with_name(f".{output.name}.export")
    shutil.rmtree(work, ignore_errors=True)
    stock = AutoModelForCausalLM.from_config(found.config, dtype=torch.float32).eval()
    stock.load_state_dict(dict(renamed(model.state_dict(), found)))
    stock.save_pretrained(work)
    off = difference(model, AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32).eval())
    if not off <= TOLERANCE:  # nor where either is NaN
        shutil.rmtree(work)
        raise OutputError(f"the stock model's logits differ by {off:.1e} of the largest: nothing was written")
    if (checkpoint.path / "tokenizer_config.json").is_file():
        checkpoint.tokenizer().save_pretrained(work)
    if output.exists():
        shutil.rmtree(output)
    return work.replace(output)


def check(checkpoint: Checkpoint) -> None:
    """That the weights are those the configuration asks for, before any is read.

    Raises:
        CheckpointError: they are not, or the configuration describes no model. OptionError: its parts do not fit.
        UnsupportedModelError: they are in a compressed format.
    """
    if "quantization_config" in checkpoint.config:
        raise UnsupportedModelError(f"{checkpoint.path} is compressed: export the model it was made of")
    try:
        empty = checkpoint.skeleton()
    except MoekitError:
        raise
    except Exception as error:
        said = (str(error).strip() or "nothing said").splitlines()[0]
        kind = type(error).__name__
        raise CheckpointError(f"{checkpoint.path}: its config.json describes no model ({kind}: {said})") from None
    wanted = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
    stored = {name: list(info.shape) for name, info in checkpoint.tensors.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        found, asked = stored.get(name), wanted.get(name)
        if asked is None:
            raise CheckpointError(f"{checkpoint.path}: {name} has no place in the model its configuration describes")
        if found is None and name not in empty.all_tied_weights_keys:
            raise CheckpointError(f"{checkpoint.path}: {name} is missing, and its configuration asks for it")
        if found not in (None, asked):
            raise CheckpointError(f"{checkpoint.path}: {name} has shape {found}, its configuration asks for {asked}")


def architecture(config: MoekitConfig) -> Architecture:
    """What of a configuration stock families know.

    Raises :class:`UnsupportedModelError` that names the first part they do not.
    """
    for name, (table, plain) in _PLAIN.items():
        specs = getattr(config, name)
        for spec in specs if isinstance(specs, list) else [specs]:
            if settled(table, spec) != settled(table, plain):
                raise UnsupportedModelError(f"no stock family has {name} = {spec!r}")
    for name, none in (("memory", None), ("layers_per_bank", 1)):
        if getattr(config, name) != none:
            raise UnsupportedModelError(f"no stock family has {name} = {getattr(config, name)!r}")
    if config.others:
        raise UnsupportedModelError(f"no stock family has experts of the kinds {config.others}")
    parts, dense = router_parts(config), dense_layers(config)
    sites = [config.site(layer) for layer in range(config.num_hidden_layers) if layer not in dense] or [config.site(0)]
    counts = {(site.num_experts, parts["select"]["k"] or site.top_k) for site in sites}
    if len(counts) > 1:
        raise UnsupportedModelError("no stock family has numbers of experts, or of slots, that differ between layers")
    over_chosen = parts["weigh"]["kind"] == "chosen"
    if over_chosen and parts["activation"]["kind"] != "softmax":
        raise UnsupportedModelError("no stock family weighs by a softmax over the chosen and ranks by a sigmoid")
    ((num_experts, top_k),) = counts
    groups, kept = parts["select"].get("groups", 1), parts["select"].get("keep", 1)
    return Architecture(
        sizes={name: getattr(config, name) for name in _SIZES},
        num_experts=num_experts,
        top_k=top_k,
        expert_size=config.moe_intermediate_size,
        qk_norm=config.qk_norm,
        scores=parts["activation"]["kind"],
        normalise=over_chosen or parts["weigh"]["normalise"],
        scale=parts["weigh"]["scale"],
        corrected=config.correction is not None,
        shared_size=config.shared_expert_intermediate_size,
        dense_layers=dense,
        dense_size=config.intermediate_size,
        groups=groups if kept < groups else 1,  # where all are kept, nothing is limited
        groups_kept=kept if kept < groups else 1,
    )


def dense_layers(config: MoekitConfig) -> tuple[int, ...]:
    """The layers without experts, however the configuration says so."""
    found = set(config.dense_layers or ())
    for layer in set(range(config.num_hidden_layers)) - found:
        spec = config.feed_forward_of(layer)
        kind = settled(FEED_FORWARDS, spec)["kind"]
        if kind not in ("moe", "dense"):
            raise UnsupportedModelError(f"no stock family has feed_forward = {spec!r}")
        if kind == "dense":
            found.add(layer)
    return tuple(sorted(found))


def router_parts(config: MoekitConfig) -> dict[str, dict[str, Any]]:
    """The parts of the router, :func:`settled`.

    Raises :class:`UnsupportedModelError` for one that no family has.
    """
    parts = {}
    for name, spec in (DEFAULTS | (config.router or {})).items():
        table, kinds, free = _ROUTER[name]
        part = settled(table, spec)
        plain = part | settled(table, part["kind"])
        if part["kind"] not in kinds or any(value != plain[key] for key, value in part.items() if key not in free):
            raise UnsupportedModelError(f"no stock family has a router with {name} = {spec!r}")
        parts[name] = part
    return parts


def settled(table: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The kind of a part and all of its options, at their defaults where none are given."""
    given = {"kind": spec} if isinstance(spec, str) else dict(spec)
    parameters = inspect.signature(table[given["kind"]]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | given


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
