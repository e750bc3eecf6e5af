"""Which experts a task needs, in a few bytes per task; finding a query's task; reading only its experts.

A task is stored as the scores of the first MoE layer, which are its key, and for every layer the permutation that takes
the experts in that layer's order of scores: rank r of the key stands for rank r of the layer. So any number of experts
can be kept later, and each layer gets exactly its own best (PreMoe, 2025).
Shapes by suffix: L layers, E experts, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moekit.blocks import blocks
from moekit.compress._scores import tcess
from moekit.compress._select import count_to_keep
from moekit.errors import OptionError, OutputError, PlanError, ProfileError
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.live import batches
from moekit.plan.planner import Source, sites_of

if TYPE_CHECKING:
    from moekit.blocks import Observation
    from moekit.profile import Profile
    from moekit.stream import Runner

FORMAT, VERSION = "moekit-patterns", "1"


class Match(NamedTuple):
    """The nearest task, its L2 distance, and by how much the next one is further."""

    task: str
    distance: float
    margin: float


@dataclass(frozen=True, eq=False)
class Patterns:
    """``keys`` [E] float64 by task and ``ranks`` int32 [L, E] by task, of the ``layers`` named, in order.

    ``ranks[task][l, e]`` is the expert of layer l that ranks as expert e does in the key.
    """

    source: str
    layers: tuple[str, ...]
    keys: Mapping[str, np.ndarray]
    ranks: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, profile: Profile, source: Source, *, strongest: int = 1, threshold: float = 0.0) -> Patterns:
        """One pattern per domain of the profile.

        Raises:
            ProfileError: the profile is of another model, or lacks ``strong_logit``. PlanError: layers differ in their
            numbers of experts or groups, so that ranks of one say nothing of another.
        """
        profile.check_source(source.fingerprint)
        sites = [site for site in sites_of(source) if not site.extra]
        odd = next((s for s in sites if (s.num_experts, s.groups) != (sites[0].num_experts, sites[0].groups)), None)
        if odd is not None:
            raise PlanError(
                f"patterns need as many experts and groups in every layer, but {sites[0].name} has "
                f"{sites[0].num_experts} experts and {odd.name} {odd.num_experts}: plan by --with premoe instead"
            )
        keys, ranks = {}, {}
        for task in profile.domains:
            seen = [profile.layers[site.name] for site in sites]
            scores = [tcess(layer, [task], strongest=strongest, threshold=threshold) for layer in seen]
            orders = [ranking(score_E, sites[0].num_groups) for score_E in scores]
            perms = np.empty((len(sites), sites[0].num_experts), dtype=np.int32)
            for perm_E, order_E in zip(perms, orders, strict=True):
                perm_E[orders[0]] = order_E
            keys[task], ranks[task] = scores[0], perms
        return cls(source.fingerprint, tuple(site.name for site in sites), keys, ranks)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.keys)

    def retrieve(self, marker_E: np.ndarray) -> Match:
        """The task whose key is nearest to a query's :func:`marker`; ties go to the one stored first."""
        if not self.keys:
            raise OptionError("there is no pattern to choose from: store one per task first")
        far = {task: float(np.linalg.norm(key_E - marker_E)) for task, key_E in self.keys.items()}
        first, *others = sorted(far, key=lambda task: far[task])
        return Match(first, far[first], far[others[0]] - far[first] if others else float("inf"))

    def without(self, task: str) -> Patterns:
        """The other tasks."""
        keys, ranks = ({name: one for name, one in of.items() if name != task} for of in (self.keys, self.ranks))
        return replace(self, keys=keys, ranks=ranks)

    def check_source(self, fingerprint: str) -> None:
        """PlanError for patterns of another model."""
        if fingerprint != self.source:
            raise PlanError(
                f"the patterns are of another model (fingerprint {self.source[:12]}, this one has "
                f"{fingerprint[:12]}): profile this model and store them again"
            )

    def experts(self, task: str, count: int, num_groups: int = 1) -> dict[str, tuple[int, ...]]:
        """The ``count`` best experts of every layer, ascending. OptionError for a task that is not stored."""
        return {name: tuple(sorted(ids[:count])) for name, ids in self.ordered(task, num_groups).items()}

    def ordered(self, task: str, num_groups: int = 1) -> dict[str, list[int]]:
        """All experts of every layer, best first. OptionError for a task that is not stored."""
        if task not in self.keys:
            raise OptionError(f"there is no pattern for the task '{task}': there are {', '.join(self.tasks)}")
        order_E = ranking(self.keys[task], num_groups)
        return {name: perm_E[order_E].tolist() for name, perm_E in zip(self.layers, self.ranks[task], strict=True)}

    def plan(self, task: str, keep: float | int, source: Source) -> Plan:
        """Keep a task's best experts. PlanError for patterns of another model and impossible counts."""
        self.check_source(source.fingerprint)
        sites = {site.name: site for site in sites_of(source) if not site.extra}
        site = sites[self.layers[0]]
        kept = self.experts(task, count_to_keep(keep, site), site.num_groups)
        why = f"keeps {len(kept[site.name])} of {site.num_experts} by the stored pattern of the task {task}"
        layers = {name: LayerPlan.keep(ids, sites[name].num_experts, why=why) for name, ids in kept.items()}
        changed = any(len(layer.rows) != layer.num_experts for layer in layers.values())
        extra = "drop" if changed and any(site.extra for site in sites_of(source)) else "keep"
        return Plan(source=self.source, layers=layers, methods=(f"pattern:task={task},keep={keep}",), extra=extra)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """One safetensors file. OutputError if it exists or cannot be written."""
        path = Path(path)
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists; give another path or allow overwriting")
        tensors = {f"{i}.{kind}": table for i, task in enumerate(self.keys) for kind, table in self._tables(task)}
        names = json.dumps({"source": self.source, "layers": self.layers, "tasks": self.tasks})
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(save(tensors, {"format": FORMAT, "version": VERSION, "names": names}))
            partial.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write the patterns to {path}: {error.strerror}") from None

    def _tables(self, task: str) -> Sequence[tuple[str, np.ndarray]]:
        return ("key", np.asarray(self.keys[task], np.float64)), ("ranks", self.ranks[task])

    @classmethod
    def load(cls, path: str | Path) -> Patterns:
        """ProfileError for a file that is missing or holds no patterns."""
        try:
            with safe_open(path, "numpy") as file:
                said = file.metadata() or {}
                if (said.get("format"), said.get("version")) != (FORMAT, VERSION):
                    raise ProfileError(f"{path} holds no patterns of version {VERSION}: store them again")
                names = json.loads(said["names"])
                found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ProfileError(f"the patterns {path} cannot be read: {str(error).splitlines()[0]}") from None
        keys = {task: found[f"{i}.key"] for i, task in enumerate(names["tasks"])}
        ranks = {task: found[f"{i}.ranks"] for i, task in enumerate(names["tasks"])}
        return cls(names["source"], tuple(names["layers"]), keys, ranks)


def ranking(score_E: np.ndarray, num_groups: int = 1) -> np.ndarray:
    """All experts, best first, so that the first M are the M to keep for every M that the groups divide.

    Ties go to the lower id. With groups, each group's best come first, then each one's second, and so on.
    """
    ids = np.arange(len(score_E))
    group = ids // (len(score_E) // num_groups)
    order = np.lexsort((ids, -score_E, group))
    place = np.empty_like(ids)
    place[order] = np.arange(len(ids)) % (len(ids) // num_groups)
    return np.lexsort((ids, -score_E, place))


class _Reached(Exception):  # noqa: N818 - nothing went wrong
    """The first MoE layer has chosen: nothing after it is needed."""


def marker(runner: Runner, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """[E] float64: the vector by which a query's task is found, from one pass up to the first MoE layer.

    Mean over the query's tokens of an expert's router logit where it is the largest. Raises PlanError for a query
    without two tokens.
    """
    block = min(blocks(runner.model), key=lambda one: one.layer)
    total_E, tokens = np.zeros(block.num_experts), 0

    def seen(observation: Observation) -> None:
        nonlocal tokens
        assert observation.routing.logits is not None
        top, expert_T = observation.routing.logits.double().max(dim=1)
        np.add.at(total_E, expert_T.cpu().numpy(), top.cpu().numpy())
        tokens += len(expert_T)
        raise _Reached

    with torch.no_grad(), block.observe(seen):
        for ids in batches(sequences, 8):
            try:
                list(runner.forward([{"input_ids": ids}], logits=False))
            except _Reached:
                continue
    if not tokens:
        raise PlanError("a query needs two tokens or more to be told apart: give more of it")
    return total_E / tokens
