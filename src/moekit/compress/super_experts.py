"""Super experts: find the few experts that make massive activations, and keep any other method's hands off them.

Paper: Unveiling Super Experts in Mixture-of-Experts Large Language Models, 2025 (n 7, arXiv 2507.23279).
Method: a[l, e] = max |W_down h| over tokens and channels, unweighted; of the first 75 % of the layers, e is a super
    expert if a[l, e] > the 99.5th percentile of all and > a tenth of the largest. Probe: its down projection at zero.
Uses: compress._scores, compress._protect, compress._sinks
Differs: the tenth is not rounded down as in the paper's code; all tokens count, not the first of each batch.
Claim: Qwen3-30B-A3B has 3 of 6144; without these 3 it repeats itself, without 3 random ones it hardly changes.
Shown: lab.experiments.super_experts
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._options import method
from moekit.compress._protect import around, even
from moekit.compress._scores import super_experts
from moekit.compress._sinks import Sinks, sinks
from moekit.errors import OptionError
from moekit.plan.document import LayerPlan, Plan, StoredExpert
from moekit.plan.planner import Evaluate, Method, Source, sites_of

if TYPE_CHECKING:
    from moekit.profile import Profile

__all__ = ["Sinks", "SuperExperts", "silenced", "sinks", "super_experts"]


@dataclass(frozen=True, kw_only=True)
class SuperExperts(Method):
    """``planner`` is the method to protect them from, with its options after a colon and ``;`` between these
    (``super-experts:planner=reap:keep=0.5;domains=code``); with "none" they are only named, and nothing changes."""

    planner: str = "none"
    percentile: float = 99.5
    depth: float = 0.75
    ratio: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"max_abs_down"})

    def __post_init__(self) -> None:
        for name, most in (("percentile", 100), ("depth", 1), ("ratio", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise OptionError(f"super-experts: {name}={getattr(self, name)} must lie between 0 and {most}")
        self._inner()

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        seen = self.observed(profile, source)
        sites = {site.name: site for site in sites_of(source) if not site.extra}
        layers = {name: seen[name] for name in sites}
        found = super_experts(layers, depth=self.depth, percentile=self.percentile, ratio=self.ratio)
        named = {name: [e for e in found.get(name, ()) if e >= 0] for name in sites}
        inner = self._inner()
        if inner is None:
            whole = {name: LayerPlan.identity(site.num_experts, why=_why(named[name])) for name, site in sites.items()}
            return self.made(whole, profile, source)
        guarded = {name: even(named[name], layers[name].max_abs_down.tolist(), site) for name, site in sites.items()}
        return self.made(around(inner, guarded, profile, source, evaluate), profile, source)

    def _inner(self) -> Method | None:
        return None if self.planner == "none" else method(self.planner.replace(";", ","))


def silenced(source: Source, experts: Mapping[str, Collection[int]]) -> Plan:
    """The probe: the named experts of each layer return zeros, and the router still sends tokens to them."""
    layers = {}
    for site in sites_of(source):
        mute = set(experts.get(site.name, ()))
        if strange := mute - set(range(site.num_experts)):
            raise OptionError(f"{site.name} has no expert {min(strange)}: it has 0 to {site.num_experts - 1}")
        if mute:
            whole = LayerPlan.identity(site.num_experts, why=f"silences {', '.join(map(str, sorted(mute)))}")
            stored = (StoredExpert(((e, 0.0 if e in mute else 1.0),)) for e in range(site.num_experts))
            layers[site.name] = replace(whole, experts=tuple(stored))
    return Plan(source=source.fingerprint, layers=layers, methods=("silenced",))


def _why(found: Collection[int]) -> str:
    return f"super experts: {', '.join(map(str, found))}" if found else "no super expert"
