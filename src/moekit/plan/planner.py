"""What every method is: something that makes a plan from a profile and a source.

``Planner`` sees the whole model; ``LayerPlanner`` is the common case that decides one layer at a time. A method is a
frozen dataclass, and the dataclass is its configuration: its fields are the options of the command line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from moekit.errors import ProfileError
from moekit.plan.check import check_layer, check_routers
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.recombine import recombined
from moekit.plan.resume import planned_layers

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile, Profile

Evaluate = Callable[[Plan], float]
"""Loss of the model under a plan (nats per token on calibration text), for methods that search; lower is better."""


@dataclass(frozen=True)
class Site:
    """One MoE layer as planners see it. ``groups`` is (groups, groups a token may use) or None; ``extra`` marks a
    prediction layer that no text runs through; ``users`` counts the routers that choose from its experts."""

    name: str
    num_experts: int
    top_k: int
    groups: tuple[int, int] | None = None
    extra: bool = False
    users: int = 1

    @property
    def num_groups(self) -> int:
        return self.groups[0] if self.groups else 1


class Source(Protocol):
    """What a planner may ask of a model: a ``Checkpoint`` is one, so is a checkpoint seen through a plan."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def moe_layers(self) -> Sequence[Any]:
        """Objects with the fields of :class:`Site`."""
        ...

    def bank(self, layer: str) -> DenseBank: ...


class Planner(Protocol):
    """``plan`` never writes anything; ``needs`` names the statistics the profile must hold (empty: no profile)."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def spec(self) -> str:
        """The method and all its options as one would type them: ``reap:keep=0.5``."""
        ...

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan: ...


class Method(ABC):
    """What every method in the catalogue has by being a dataclass in a file of its own: a name and a specification."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def spec(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        options = ",".join(f"{name}={_shown(value)}" for name, value in values.items() if value != ())
        return f"{self.name}:{options}" if options else self.name

    @abstractmethod
    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan: ...

    def made(self, layers: Mapping[str, LayerPlan], profile: Profile | None, source: Source) -> Plan:
        """The finished plan, checked. Prediction layers that no profile can see are dropped once counts change."""
        sites = sites_of(source)
        for site in sites:
            if site.name in layers:
                check_layer(site.name, layers[site.name], top_k=site.top_k, groups=site.groups)
        changed = any(len(layer.rows) != layer.num_experts for layer in layers.values())
        return Plan(
            source=source.fingerprint,
            profile=profile.fingerprint if profile and self.needs else None,
            methods=(self.spec,),
            layers=layers,
            extra="drop" if changed and any(site.extra for site in sites) else "keep",
        )

    def observed(self, profile: Profile | None, source: Source) -> Mapping[str, LayerProfile]:
        """The layers of the profile. ProfileError if it is missing, of another model or incomplete."""
        if not self.needs:
            return {}
        if profile is None:
            raise ProfileError(f"{self.name} needs a profile: give --profile, or --text to make one")
        profile.check_source(source.fingerprint)
        profile.require(sorted(self.needs))
        for site in sites_of(source):
            if not site.extra and site.name not in profile.layers:
                raise ProfileError(f"the profile has nothing on layer {site.name}: profile this checkpoint again")
        return profile.layers


class LayerPlanner(Method):
    """A method that decides each layer from that layer alone; several processes share the layers out."""

    @abstractmethod
    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        """``layer`` is what the profile saw (absent where ``needs`` is empty); ``bank`` reads the weights if called."""

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        seen = self.observed(profile, source)
        done = source.done.fingerprint if isinstance(source, PlannedSource) else None
        seen_in = profile.fingerprint if profile and self.needs else None
        follows = [self.spec, source.fingerprint, done, seen_in]
        makers = {
            site.name: partial(
                self.plan_layer, cast("LayerProfile", seen.get(site.name)), partial(source.bank, site.name), site
            )
            for site in sites_of(source)
            if not site.extra
        }
        return self.made(planned_layers(makers, follows), profile, source)


@dataclass(frozen=True)
class PlannedSource:
    """A source as a plan would leave it: what the next method in a sequence works on."""

    source: Source
    done: Plan

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def moe_layers(self) -> Sequence[Site]:
        return [self._site(site) for site in sites_of(self.source)]

    def bank(self, layer: str) -> DenseBank:
        bank = self.source.bank(layer)
        plan = self.done.layers.get(layer)
        return bank if plan is None or plan.untouched else recombined(bank, plan)

    def _site(self, site: Site) -> Site:
        plan = self.done.layers.get(site.name)
        if plan is None or plan.untouched:
            return site
        groups = site.groups
        if groups and plan.plain_slots:
            left = {row[0][0] // (site.num_experts // groups[0]) for row in plan.rows}
            groups = (len(left), groups[1])
        return Site(site.name, len(plan.experts), min(site.top_k, len(plan.experts)), groups, site.extra)


def sites_of(source: Source) -> list[Site]:
    """The layers of a source; raises :class:`UnsupportedModelError` where several routers share their experts."""
    check_routers(source.moe_layers)
    return [Site(m.name, m.num_experts, m.top_k, m.groups, m.extra) for m in source.moe_layers]


def make_plan(
    planners: Sequence[Planner], source: Source, profile: Profile | None = None, evaluate: Evaluate | None = None
) -> Plan:
    """Methods in sequence: each sees the layers as the ones before left them, and the results compose into one plan."""
    plan = Plan(source=source.fingerprint, layers={})
    for planner in planners:
        seen: Source = PlannedSource(source, plan) if plan.layers else source
        plan = plan.then(planner.plan(profile and profile.recombined(plan), seen, _after(plan, evaluate)))
    if profile is not None and any(planner.needs for planner in planners):
        return replace(plan, profile=profile.fingerprint)
    return plan


def _after(done: Plan, evaluate: Evaluate | None) -> Evaluate | None:
    """The loss of what is planned on top of ``done``."""
    return None if evaluate is None else lambda later: evaluate(done.then(later))


def _shown(value: Any) -> str:
    return (
        "+".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is True else str(value)
    )
