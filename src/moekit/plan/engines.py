"""Would other engines load it? Names and shapes of an output held against what vLLM and the GGUF converter look for.

Neither is run. What they expect, read from their sources: vLLM's expert mapping asks for experts 0 to N-1 of every
layer under the family's names, N from the config, one quantisation scheme per layer; expert parallelism splits N
evenly. The GGUF converter collects N experts times their projections per block, fails on leftovers, counts prediction
layers by the config, and needs a tokenizer beside the weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit.plan.produce import Production

_EXPERT = re.compile(r"^(.*experts\.)(?:expert_)?(\d+)\.(.+)$")
_PARALLEL = (2, 4, 8, 16)


def expectations(production: Production, files: Collection[str]) -> dict[str, Any]:
    """By engine: whether the output meets its expectations, what stands against it, and what to know.

    Args:
        files: names of the files that will lie beside the weights.
    """
    shapes = {name: lazy.shape for name, lazy in production.tensors.items() if name in production.expert_names}
    numbering = _numbering(shapes, production.target.num_rows)
    packed = production.target.format == "moekit"
    against_vllm = [*numbering, *_vllm(production)] if not packed else ["it does not read moekit's packed experts"]
    against_gguf = (
        [*numbering, *_gguf(production, files)] if not packed else ["it does not read moekit's packed experts"]
    )
    advice = ["export with --format compressed-tensors or a plan without quantisation"] if packed else []
    return {
        "vllm": {"ok": not against_vllm, "against": against_vllm, "notes": advice or _parallel(production)},
        "gguf": {"ok": not against_gguf, "against": against_gguf, "notes": advice or _gguf_notes(production)},
    }


def _numbering(shapes: Mapping[str, Sequence[int]], count: int) -> list[str]:
    """What is wrong with the experts' numbers or shapes, a line each."""
    parts: dict[str, dict[str, dict[int, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    problems = []
    for name, shape in shapes.items():
        match = _EXPERT.match(name)
        if match:
            parts[match[1]][match[3]][int(match[2])] = tuple(shape)
        elif shape[0] % count:
            problems.append(f"{name} stacks {shape[0]} rows, which {count} experts do not divide")
    for prefix, by_part in parts.items():
        for part, found in by_part.items():
            if sorted(found) != list(range(count)):
                problems.append(f"{prefix}*.{part}: {len(found)} experts where the config states {count}")
            elif len(set(found.values())) > 1:
                problems.append(f"{prefix}*.{part}: experts differ in shape")
    return problems


def _vllm(production: Production) -> list[str]:
    if not production.config.get("architectures"):
        return ["config.json names no architecture"]
    return []


def _parallel(production: Production) -> list[str]:
    count = production.target.num_rows
    even = [str(size) for size in _PARALLEL if count % size == 0]
    notes = [f"expert parallelism over {', '.join(even)} ranks" if even else f"{count} experts do not split evenly"]
    if production.target.format == "compressed-tensors":
        layer = next(iter(production.target.layers.values()))
        first = layer.experts[0]
        assert first is not None
        inner = layer.layer.intermediate_size // first.group_size
        sizes = [str(size) for size in (1, *_PARALLEL) if inner % size == 0]
        notes.append(f"tensor parallelism over {', '.join(sizes)} ranks keeps whole groups of {first.group_size}")
    return notes


def _gguf(production: Production, files: Collection[str]) -> list[str]:
    problems = []
    if not production.config.get("architectures"):
        problems.append("config.json names no architecture")
    if not {"tokenizer.json", "tokenizer.model", "tekken.json"} & set(files):
        problems.append("no tokenizer lies beside the weights")
    return problems


def _gguf_notes(production: Production) -> list[str]:
    if production.target.format == "compressed-tensors":
        return ["needs a converter that decodes pack-quantized weights"]
    return []
