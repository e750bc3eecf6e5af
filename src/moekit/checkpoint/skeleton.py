"""The model class a checkpoint's config names, built without weights on the meta device."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from moekit.errors import CheckpointError, UnsupportedModelError

COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What families call the number of routed experts."""
GROUP_FIELDS = ("n_group", "num_expert_group")
"""What families call the number of groups the experts are ranked in."""


def load_config(where: str, raw: dict[str, Any]) -> PretrainedConfig:
    """The config object that ``raw``, the config.json found at ``where``, describes.

    Raises:
        CheckpointError: it names no model type. UnsupportedModelError: one that this transformers does not have.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{where} is no transformers model: its config.json names no model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{where} is of type {kind!r}, which transformers {transformers.__version__} does not know "
            "(moekit runs no code from checkpoints)"
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps({key: value for key, value in raw.items() if key != "auto_map"})
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
            return AutoConfig.from_pretrained(folder)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{where}: its config.json is no valid {kind} config: {said[:200]}") from None


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class named by the config's architectures, else the one transformers maps its type to."""
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if (
            isinstance(cls, type)
            and issubclass(cls, PreTrainedModel)
            and isinstance(config, getattr(cls, "config_class", None) or ())
        ):
            return cls
    autos = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
    for auto in autos:
        found = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedModelError(f"transformers has no model class for {type(config).__name__}")


def build(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device, in the config's dtype unless another is given; float32 where the family insists."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = model_class(config)
    dtype = dtype or config.dtype or torch.float32
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    plan = model._get_dtype_plan(dtype)
    if plan:
        wide = re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and wide.search(name):
                tensor.data = tensor.data.float()
    return model.eval()


def nested(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config and every config inside it."""
    found = [config]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            found += nested(value)
    return found


def grown(config: PretrainedConfig) -> tuple[PretrainedConfig, int] | None:
    """A copy that asks for more experts wherever it asks for any, and how many more; None for a dense config.

    The step keeps every group of experts equally full.
    """
    config = copy.deepcopy(config)
    parts = nested(config)
    groups = [getattr(part, name, None) for part in parts for name in (*GROUP_FIELDS, "expert_step")]
    step = math.lcm(*(group for group in groups if type(group) is int and group > 0))
    fields = [(part, name) for part in parts for name in COUNT_FIELDS if _counts(vars(part).get(name))]
    for part, name in fields:
        count = vars(part)[name]
        setattr(part, name, count + step if type(count) is int else [each + step for each in count])
    return (config, step) if fields else None


def names_experts(config: PretrainedConfig) -> bool:
    """Whether a config asks for experts at all, be it one."""
    return any(_counts(vars(part).get(name), least=1) for part in nested(config) for name in COUNT_FIELDS)


def _counts(value: object, least: int = 2) -> bool:
    """Whether a field holds a number of experts from ``least`` on, or one for each layer."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(one) is int for one in values) and max(values) >= least
