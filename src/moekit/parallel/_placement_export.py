"""Placements in the forms that servers read. Each says what was read to write it; none of them was run here.

- "sglang": the JSON that `--init-expert-location FILE.json` takes (python/sglang/srt/eplb/expert_location.py, commit
  01fec5c): `physical_to_logical_map`, one row per decoder layer, dense ones included, of the experts in the order of
  their slots; device p keeps slots p * E / P to (p + 1) * E / P.
- "vllm": one list per MoE layer in the same order, the shape of `EplbModelState.physical_to_logical_map`
  (vllm.distributed.eplb.eplb_state, documentation of 0.14.0 to 0.26.0). No vLLM release seen reads one from a file:
  pull request 49572 (open in July 2026) adds `eplb_config.initial_expert_map_path` for exactly this list, and 53022
  (open in August 2026) an `expert_map_path` for one family alone.
- "vllm-ascend": the JSON that `eplb_config.expert_map_path` takes (vllm_ascend/eplb, readers and writers of the 0.11
  line and later): `moe_layer_count` and, per layer, `layer_id`, `device_count` and, per device, `device_expert`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moekit.errors import PlanError
from moekit.parallel._placement_file import PlacementFile
from moekit.parallel.placement import Placement


def slots(placement: Placement, layer: int) -> list[int]:
    """[E] the expert in every slot: device 0's experts in ascending order, then device 1's and so on."""
    return [expert for device in range(placement.devices) for expert in placement.experts(layer, device)]


def sglang(file: PlacementFile) -> dict[str, Any]:
    rows = [list(range(file.placement.num_experts)) for _ in range(file.decoder_layers)]
    for index, (_, number) in enumerate(file.layers):
        rows[number] = slots(file.placement, index)
    return {"physical_to_logical_map": rows}


def vllm(file: PlacementFile) -> list[list[int]]:
    return [slots(file.placement, index) for index in range(file.placement.num_layers)]


def vllm_ascend(file: PlacementFile) -> dict[str, Any]:
    devices = range(file.placement.devices)
    layers = [
        {
            "layer_id": index,
            "device_count": len(devices),
            "device_list": [{"device_id": p, "device_expert": file.placement.experts(index, p)} for p in devices],
        }
        for index in range(file.placement.num_layers)
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


EXPORTS: dict[str, Callable[[PlacementFile], Any]] = {"sglang": sglang, "vllm": vllm, "vllm-ascend": vllm_ascend}


def export(file: PlacementFile, form: str) -> Any:
    """What a server reads, as JSON takes it. PlanError where it wants equal numbers of experts and there are not."""
    if not file.placement.even:
        sizes = file.placement.sizes
        raise PlanError(
            f"{form} wants the same number of experts on every device, this placement has {sizes.min()} to "
            f"{sizes.max()}: place with exflow or balanced"
        )
    return EXPORTS[form](file)
