"""Would stock transformers load it? Its own loading code, run on names, shapes and dtypes without reading a weight."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import logging as transformers_logging

from moekit.checkpoint.bars import no_bars
from moekit.checkpoint.skeleton import model_class

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> (dtype, shape), as the headers of the files have them."""

LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys")
_META = torch.device("meta")


def dry_load(folder: Path, specs: Specs) -> dict[str, Any]:
    """Which keys loading ``folder`` would miss, not expect, mismatch or fail to convert.

    ``folder`` needs only its config.json; the tensors are those of ``specs``, on the meta device. A layout whose loader
    does not run on this machine gives ``{"error": ...}``.
    """
    config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype or torch.float32
    try:
        with _quiet():
            model, quantizer = _skeleton(config, dtype)
    except (ImportError, RuntimeError, ValueError) as error:
        if getattr(config, "quantization_config", None) is None:
            raise
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    with _quiet():
        return _load(model, quantizer, specs, dtype)


def problems(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with a load, one line per key."""
    return [f"{key.replace('_', ' ')[:-1]} {name}" for key in LISTS for name in found.get(key, ())]


def _load(model: PreTrainedModel, quantizer: HfQuantizer | None, specs: Specs, dtype: torch.dtype) -> dict[str, Any]:
    tensors = {name: torch.empty(shape, dtype=kind, device=_META) for name, (kind, shape) in specs.items()}
    loading = LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(model, hf_quantizer=quantizer),
        hf_quantizer=quantizer,
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": _META},
    )
    info, _ = convert_and_load_state_dict_in_model(model, tensors, loading)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return {
        "how": "dry run: names, shapes and dtypes on the meta device",
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "itemsize": dtype.itemsize,
        "missing_keys": sorted(info.missing_keys),
        "unexpected_keys": sorted(info.unexpected_keys),
        "mismatched_keys": sorted(map(str, info.mismatched_keys)) + sorted(info.conversion_errors),
    }


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, HfQuantizer | None]:
    quantizer, config, _ = get_hf_quantizer(config, None, {"": _META}, True, {})
    with _META:
        model = model_class(config)._from_config(config, dtype=dtype)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map={"": _META}, checkpoint_files=None, use_kernels=False
            )
    return model, quantizer


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars (quantisers draw their own, on stderr) and no reports for a load that loads nothing."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with no_bars(), redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
