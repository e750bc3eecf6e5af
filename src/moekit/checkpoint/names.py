"""From a tensor's name on disk to the parameter it becomes, by transformers' own conversion mapping."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

EXPERT_INDEX = re.compile(r"(?<=experts\.)((?:expert_)?)(\d+)(?=\.)")
_OWN = re.compile(r"(.*\.experts)\.(?:\d+|shared)\.(gate_up|gate|up|down)(\.\w+)?")
"""Expert tensors as moekit's own formats name them."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor on disk goes: ``parameter``, as source number ``source`` of ``sources`` that are joined into it.

    ``operations`` are the names of the steps applied; ``targets`` counts the parameters it is split into.
    """

    parameter: str
    source: int = 0
    sources: int = 1
    targets: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()


class NameMap:
    """Maps names on disk to parameters of one model. Call it on names in natural order."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._cache: dict[str, Target] = {}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._state

    def target(self, name: str) -> Target:
        """The target of a tensor; its parameter may be unknown to the model (extra layers, stray tensors)."""
        match = EXPERT_INDEX.search(name)
        if match is None or name in self._state:
            return self._find(name)
        # Experts of one layer differ only in their number: ask once, for expert 0.
        first = EXPERT_INDEX.sub(r"\g<1>0", name, count=1)
        if first not in self._cache:
            self._cache[first] = self._find(first)
        target = self._cache[first]
        if EXPERT_INDEX.search(target.parameter):
            return self._find(name)
        return target

    def _find(self, name: str) -> Target:
        found, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if found not in self._state and name in self._state:
            found, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        if pattern is None:
            packed = _OWN.fullmatch(found)
            return Target(self._stock_name(packed), operations=("Canonical",)) if packed else Target(found)
        converter = self._by_pattern[pattern]
        first, *others = converter.target_patterns
        return Target(
            parameter=found,
            source=converter.source_patterns.index(pattern),
            sources=len(converter.source_patterns),
            targets=(found, *(found.replace(first, other) for other in others)),
            operations=tuple(_operation(operation) for operation in converter.operations),
        )

    def _stock_name(self, packed: re.Match[str]) -> str:
        """The parameter that moekit's own ``experts.N.gate_up.weight`` stands for."""
        owner, kind = packed[1], "_bias" if packed[3] == ".bias" else ""
        part = "down" if packed[2] == "down" else "gate_up"
        names = (f"{owner}.{part}_proj{kind}", f"{owner}.{part.removeprefix('gate_')}_proj{kind}")
        return next((name for name in names if name in self._state), names[0])


def _operation(operation: ConversionOps) -> str:
    return type(operation).__name__ + ("IfNeeded" if getattr(operation, "check_dims", False) else "")
