"""What was observed in one MoE layer, and the arithmetic on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from moekit.errors import ProfileError
from moekit.profile.schema import FIELDS, HALVES, PHASES


class RoutePlan(Protocol):
    """The part of a layer's plan that says which observed expert becomes which: see ``moekit.plan``."""

    @property
    def experts(self) -> Sequence[Any]: ...

    @property
    def slots(self) -> Sequence[int]: ...

    @property
    def rows(self) -> Sequence[Sequence[tuple[int, float]]]: ...


@dataclass(frozen=True)
class LayerProfile:
    """``arrays`` by statistic name (``schema.FIELDS`` says what each is); ``layer.counts`` is ``arrays["counts"]``.

    A statistic that was not observed raises ProfileError, naming it.
    """

    name: str
    layer: int
    num_experts: int
    top_k: int
    domains: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_") or name not in FIELDS:
            raise AttributeError(f"LayerProfile has no attribute {name!r}")
        return self.array(name)

    def array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise ProfileError(
                f"the profile has no '{name}' for layer {self.name}: profile again with this statistic "
                f"(it has {', '.join(sorted(self.arrays))})"
            )
        return self.arrays[name]

    def total(
        self,
        statistic: str,
        domains: Sequence[str] | None = None,
        *,
        phase: str | None = None,
        half: int | None = None,
    ) -> np.ndarray:
        """The statistic summed over halves, domains and phases, or over those named: [E] (a number for "tokens").

        Raises:
            ProfileError: the statistic was not observed, or the profile has no such domain or phase.
        """
        array = self.array(statistic)
        if FIELDS[statistic].axes[:3] != "hdp":
            if domains or phase or half is not None:
                raise ProfileError(f"'{statistic}' is not kept by domain, phase or half")
            return array
        if phase is not None and phase not in PHASES:
            raise ProfileError(f"there is no phase '{phase}': a profile tells {' and '.join(PHASES)} apart")
        array = array[:, self._numbers(domains)]
        array = array[:, :, PHASES.index(phase) : PHASES.index(phase) + 1] if phase else array
        return (array if half is None else array[half : half + 1]).sum(axis=(0, 1, 2))

    def _numbers(self, domains: Sequence[str] | None) -> list[int]:
        for domain in domains or ():
            if domain not in self.domains:
                raise ProfileError(f"the profile has no domain '{domain}': it has {', '.join(self.domains)}")
        return [self.domains.index(domain) for domain in (self.domains if domains is None else domains)]

    def per_token(self, statistic: str, domains: Sequence[str] | None = None, *, half: int | None = None) -> np.ndarray:
        """Mean of a slot statistic over the tokens that chose the expert: [E], nan for an expert that none chose."""
        count = self.total("counts", domains, half=half)
        total = self.total(statistic, domains, half=half)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def share(self, statistic: str, domains: Sequence[str] | None = None, *, half: int | None = None) -> np.ndarray:
        """The statistic per token seen: [E]."""
        return self.total(statistic, domains, half=half) / max(float(self.total("tokens", domains, half=half)), 1.0)

    def error(self, statistic: str, domains: Sequence[str] | None = None) -> np.ndarray:
        """Standard error of :meth:`share` from the two halves, |a - b| / 2: [E]; nan if one half saw nothing."""
        seen = [float(self.total("tokens", domains, half=half)) for half in range(HALVES)]
        a, b = (self.share(statistic, domains, half=half) for half in range(HALVES))
        return np.abs(a - b) / 2 if min(seen) > 0 else np.full(a.shape, np.nan)

    def reliability(self, statistic: str, domains: Sequence[str] | None = None) -> float:
        """How far the ranking of experts can be trusted: the halves' rank correlation, stepped up to the whole.

        Spearman's correlation between halves, then the Spearman-Brown formula 2r / (1 + r); 1 is perfect, nan where
        it cannot be told (one half empty, or all experts equal).
        """
        a, b = (_ranks(self.total(statistic, domains, half=half)) for half in range(HALVES))
        if a.std() == 0 or b.std() == 0:
            return float("nan")
        r = float(np.corrcoef(a, b)[0, 1])
        return 2 * r / (1 + r) if r > 0 else r

    def median_ratio(self, domains: Sequence[str] | None = None, *, phase: str | None = None) -> float:
        """Median over tokens of second largest over largest combine weight, to half a bin; nan where none has two."""
        seen = self.total("weight_ratio", domains, phase=phase).cumsum()
        if not seen[-1]:
            return float("nan")
        return float((np.searchsorted(seen, seen[-1] / 2) + 0.5) / len(seen))

    def starved(self, least: int) -> tuple[int, ...]:
        """Experts with fewer than ``least`` tokens: their figures mean little."""
        return tuple(np.flatnonzero(self.total("counts") < least).tolist())

    def sample_rows(self, domains: Sequence[str] = ()) -> np.ndarray:
        """Rows of the sample that are of the named domains (all if none are named), in order."""
        if not domains:
            return np.arange(len(self.sample_expert))
        return np.flatnonzero(np.isin(self.sample_domain, self._numbers(domains)))

    def sampled(self) -> np.ndarray:
        """[E] sampled tokens that chose each expert."""
        chosen = self.array("sample_expert")
        return np.bincount(chosen[chosen >= 0], minlength=self.num_experts)

    def recombined(self, plan: RoutePlan) -> LayerProfile:
        """This layer as a plan leaves it: one column per stored expert, fed by every router row that calls it.

        Exact for what each kept token did; where tokens of a dropped expert go afterwards was not observed, and they
        are left out.
        """
        feeds = np.zeros((len(plan.experts), self.num_experts))
        for slot, row in zip(plan.slots, plan.rows, strict=True):
            if slot >= 0:
                feeds[slot, [source for source, _ in row]] = 1.0
        arrays = {name: _recombine(array, FIELDS[name].axes, feeds, name) for name, array in self.arrays.items()}
        return replace(self, num_experts=len(plan.experts), top_k=min(self.top_k, len(plan.experts)), arrays=arrays)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties shared equally."""
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.bincount(group, ranks) / size)[group]


def _recombine(array: np.ndarray, axes: str, feeds: np.ndarray, name: str) -> np.ndarray:
    """``feeds`` [M, E] of 0 and 1 applied along every axis e."""
    if name == "max_abs_down":
        return np.where(feeds > 0, array, 0.0).max(axis=1)
    if name == "sample_logits":
        # A merged expert is reached by whichever of its rows the router likes best.
        rows = [array[:, np.flatnonzero(feed)].max(axis=1, initial=-np.inf) for feed in feeds]
        return np.stack(rows, axis=1).astype(array.dtype)
    if name in ("trace_expert", "sample_expert"):
        target = np.append(np.where(feeds.any(axis=0), feeds.argmax(axis=0), -1), -1).astype(array.dtype)
        return target[array]
    for axis, letter in enumerate(axes):
        if letter == "e":
            array = np.moveaxis(np.tensordot(feeds, array, axes=(1, axis)), 0, axis)
    return array
