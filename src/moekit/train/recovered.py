"""Opening a compressed checkpoint so that it can be trained, and writing what training changed.

Everything that was not trained is copied byte for byte. Packed experts cannot be trained as they lie: they are decoded
into the family's own modules, around which routers learn; writing leaves the packed ones in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from moekit.blocks import blocks
from moekit.blocks.rewriting import attach
from moekit.checkpoint import Checkpoint, Writer, skeleton
from moekit.checkpoint.quantizer import METHOD, describe_layer, expand_layer
from moekit.checkpoint.scheme import REWRITE
from moekit.checkpoint.shards import Lazy
from moekit.errors import OptionError
from moekit.formats import DenseBank, PackedBank
from moekit.kernels.rewrites import REWRITES
from moekit.stream import LoadedModel
from moekit.train.groups import chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "recovery.json"
_EXPERTS = {"experts", "scales"}


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether experts lie in moekit's own format."""
    return bool(checkpoint.scheme.config.get("quant_method") == METHOD)


def check_possible(checkpoint: Checkpoint, what: Sequence[str]) -> None:
    """OptionError where these parts of this checkpoint cannot be trained, or the result could not be written."""
    quantised = checkpoint.scheme.config.get("quant_method")
    experts = bool(_EXPERTS & set(what))
    if not is_packed(checkpoint) and quantised and experts:
        raise OptionError(
            f"{checkpoint.path} stores its experts as {quantised}: train the router and norms around them, or "
            "compress to a stock folder and recover that"
        )
    layers = checkpoint.scheme.config["layers"] if is_packed(checkpoint) else {}
    kinds = {name: REWRITES[layer["rewrite"]["kind"]] for name, layer in layers.items() if "rewrite" in layer}
    if "rewrite" in what and not any(kind.LEARNS for kind in kinds.values()):
        raise OptionError(
            f"{checkpoint.path} has nothing at run time that recovery can train: train other parts, or compress with "
            "a method that has, such as compressed-experts"
        )
    for name, kind in kinds.items():
        if kind.EXPANDS:
            raise OptionError(
                f"{name} chooses at run time among several forms of each expert ({kind.KIND}), which training cannot "
                "pass: recover before that"
            )
    for name, layer in layers.items():
        if experts and -1 in expand_layer(layer)[1]:
            raise OptionError(
                f"{name} has router rows without an expert, which decoded experts cannot say: train the router only"
            )


def trainable(checkpoint: Checkpoint, device: torch.device) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """The model in float32 with plain experts, and by layer the stored expert of each router row (packed only).

    What changes the routing at run time does so in it as well, as ``experts.rewrite``.
    """
    model = LoadedModel.load(checkpoint, device=device, dtype=torch.float32).model
    if not is_packed(checkpoint):
        return model.requires_grad_(True), {}
    plain = skeleton.build(checkpoint.transformers_config, torch.float32)
    slots: dict[str, list[int]] = {}
    for name, layer in checkpoint.scheme.config["layers"].items():
        block = model.get_submodule(name)
        packed: Any = block.experts
        slots[name] = expand_layer(layer)[1]
        weights = [packed.bank.expert(max(0, slot)) for slot in slots[name]]
        bank = DenseBank.stack(weights, packed.bank.activation)
        experts = plain.get_submodule(name).experts.to_empty(device=device)
        block.experts = experts
        found = next(b for b in blocks(model) if b.name == name)
        own = found.bank()
        found.put(DenseBank(**{n: t.to(torch.float32) for n, t in bank.tensors().items()}, activation=own.activation))
        if packed.rewrite is not None:
            attach(packed.rewrite, found)
            experts.add_module("rewrite", packed.rewrite)
    return model.requires_grad_(True), slots


def write(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    output: Path,
    what: Sequence[str],
    report: Mapping[str, Any],
    *,
    overwrite: bool = False,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> None:
    """The checkpoint with the trained tensors in the place of its own, published once it is whole (and passes)."""
    tensors, config = _contents(model, checkpoint, what)
    job = {"recovery": {key: report[key] for key in ("trained", "source", "of", "options")}}
    with Writer(output, source=checkpoint, job=job, overwrite=overwrite) as writer:
        if not writer.done("all"):
            writer.put("all", tensors)
        folder = writer.seal(config)
        reload = check(folder) if check is not None else None
        writer.write_file(REPORT, (json.dumps({**report, "reload": reload}, indent=1) + "\n").encode())
        writer.publish()


def _contents(
    model: PreTrainedModel, checkpoint: Checkpoint, what: Sequence[str]
) -> tuple[dict[str, Tensor | Lazy], dict[str, Any]]:
    """What is written, by name, and its config. Dtypes and shapes are the source's."""
    config = dict(checkpoint.config)
    packed, experts = is_packed(checkpoint), bool(_EXPERTS & set(what))
    rewritten = packed and any("rewrite" in layer for layer in checkpoint.scheme.config["layers"].values())
    if packed and experts and not rewritten:
        config.pop("quantization_config")
        replaced = _stored(model, model.state_dict())
        return {name: tensor.to(checkpoint.scheme.dtype).contiguous() for name, tensor in replaced.items()}, config
    around = [part for part in what if part not in _EXPERTS or not packed]
    roles = list(dict.fromkeys("experts" if part == "scales" else part for part in around))
    names = chosen(model, roles) if roles else []
    tensors = _replaced(checkpoint, _stored(model, {name: model.get_parameter(name) for name in names}))
    if packed and experts:
        plain, layers = _plain_experts(model, checkpoint)
        old = tuple(f"{name}.experts." for name in layers)
        tensors = {n: t for n, t in tensors.items() if REWRITE in n or not n.startswith(old)} | plain
        config["quantization_config"] = {**config["quantization_config"], "layers": layers}
    return tensors, config


def _stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the live model by their names on disk."""
    return dict(revert_weight_conversion(model, {name: tensor.detach().cpu() for name, tensor in tensors.items()}))


def _replaced(checkpoint: Checkpoint, replaced: Mapping[str, Tensor]) -> dict[str, Tensor | Lazy]:
    """The checkpoint's tensors with some in the place of its own."""
    unknown = [name for name in replaced if name not in checkpoint.tensors]
    if unknown:
        raise OptionError(f"{unknown[0]} was trained but {checkpoint.path} stores it in another form: train less")
    made: dict[str, Tensor | Lazy] = {}
    for name, info in checkpoint.tensors.items():
        if name in replaced:
            made[name] = replaced[name].to(info.dtype).contiguous()
        else:
            made[name] = Lazy(info.dtype, info.shape, partial(checkpoint.read, name))
    return made


def _plain_experts(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The experts as trained in moekit's own format at the source's precision, one of those that share one, and what
    describes each layer."""
    tensors: dict[str, Tensor] = {}
    layers = dict(checkpoint.scheme.config["layers"])
    for block in blocks(model):
        if block.name not in layers:
            continue
        slots = expand_layer(layers[block.name])[1]
        used = sorted(set(slots))
        bank: Any = block.bank()
        bank = bank.select([slots.index(slot) for slot in used])
        cast = {name: tensor.detach().cpu().to(checkpoint.scheme.dtype) for name, tensor in bank.tensors().items()}
        plain = PackedBank.quantise(DenseBank(**cast, activation=bank.activation), 16)
        tensors |= {f"{block.name}.experts.{name}": tensor.contiguous() for name, tensor in plain.tensors().items()}
        layers[block.name] = describe_layer(
            plain, [used.index(slot) for slot in slots], layers[block.name].get("rewrite")
        )
    return tensors, layers
