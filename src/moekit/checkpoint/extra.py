"""Prediction layers beyond the trunk, which transformers ignores: read by analogy with the last MoE layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from moekit.checkpoint.names import Target
from moekit.checkpoint.structure import Structure


def by_analogy(
    unknown: Iterable[str], targets: Mapping[str, Target], parameters: Mapping[str, str], model: Structure
) -> dict[str, tuple[str, Target]]:
    """For each weight unknown to the model whose name ends as one of the last MoE layer's does: the name of the
    layer it belongs to, and the target of the weight whose part it plays there."""
    last = list(model.layers)[-1]
    experts = [name for name, p in parameters.items() if p in model.roles and model.roles[p].layer == last]
    prefix = _through_index(experts[-1]) if experts else ""
    tails = {name[len(prefix) :] for name in parameters if prefix and name.startswith(prefix + ".")}
    inside = last[len(_through_index(last)) :]
    found: dict[str, tuple[str, Target]] = {}
    for name in unknown:
        cut = next((dot for dot in dots(name) if name[dot:] in tails), None)
        if cut is not None and re.search(r"\d", name[:cut]):
            found[name] = name[:cut] + inside, targets[prefix + name[cut:]]
    return found


def dots(name: str) -> Iterator[int]:
    """Where the dots are."""
    return (place for place, letter in enumerate(name) if letter == ".")


def _through_index(name: str) -> str:
    """A name up to its first number: ``model.layers.3`` of ``model.layers.3.mlp.experts.0.up_proj.weight``."""
    match = re.match(r".*?\.\d+(?=\.|$)", name)
    return match[0] if match else ""
