"""EAQuant: one smoothing scale for router and all experts, a router rounded so that it chooses alike, balanced tokens.

Paper: EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization, 2025 (n 129, arXiv
    2506.13329).
Method: s[i, c] = (max over its tokens of |x[c]|)^0.6 / (max over its rows of |W_i[:, c]|)^0.4 for the router and each
    expert i, s = max_i s[i]; the norm before is divided by s, the columns of all who read it are multiplied. Outlier
    channels of each expert's hidden units move from down's input into up's rows (alpha 0.7). The router is rounded
    to 8 bits per row, the rows' ranges shrunk by the one ratio in 0.35..1 whose softmax over the k experts chosen
    moves least (KL divergence). An expert without calibration tokens is calibrated with all of them; profile with
    balanced=2 to have twice an even share for everyone.
Uses: compress._fold, compress._smoothing, compress._router_grid, compress._calibrated
Differs: experts are rounded by GPTQ in groups, without rotation and permutation; activations are not quantised (the
    experiment simulates it); the router's rounded values are stored as plain weights; shared experts are scaled, not
    rounded; ranges of activations are those of the sampled tokens.
Claim: 1.15 to 2.28 points above DuQuant on average at W4A4 and W3A4 on three models.
Shown: lab.experiments.eaquant
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.compress._calibrated import Feedback, check_bits, packed
from moekit.compress._fold import Fold, find_fold
from moekit.compress._layers import made
from moekit.compress._router_grid import aligned
from moekit.compress._sample import NEEDS, Sample
from moekit.compress._smoothing import input_scales, scaled_inputs, scaled_units
from moekit.errors import OptionError, PlanError
from moekit.plan import values
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.planner import Evaluate, Method, Site, Source, sites_of

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile, Profile

UNIT_ALPHA = 0.7
WITHOUT = "give smooth=none,router_bits=16 to leave norms and routers as they are"


@dataclass(frozen=True, kw_only=True)
class EAQuant(Method):
    """``bits`` per weight in groups of ``group_size``. ``smooth``: the scale is the largest over router and experts
    ("all"), the router's own ("router"), or there is none. ``router_bits`` 16 leaves the router as it is."""

    bits: int = 4
    group_size: int = 64
    smooth: Literal["all", "router", "none"] = "all"
    alpha: float = 0.6
    router_bits: int = 8
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        check_bits("eaquant", [self.bits], self.group_size)
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"eaquant: alpha={self.alpha} must lie between 0 and 1 (0.6 is the paper's)")
        if self.router_bits not in (*range(2, 9), 16):
            raise OptionError(f"eaquant: router_bits={self.router_bits} is no width for a router; use 2 to 8, or 16")

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        seen = self.observed(profile, source)
        around = cache(lambda: _Around(source))
        makers = {
            site.name: partial(self._layer, seen[site.name], partial(source.bank, site.name), site, around)
            for site in sites_of(source)
            if not site.extra
        }
        return made(self, makers, profile, source)

    def _layer(
        self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site, around: Callable[[], _Around]
    ) -> LayerPlan:
        sample, dense = Sample.of(layer, self.domains), bank()
        edits: dict[str, Tensor] = {}
        notes = []
        if self.smooth != "none":
            fold, read = around().fold(site.name), around().checkpoint.read
            experts = dense if self.smooth == "all" else dense.select([])
            scale_H = input_scales(sample, experts, [read(name) for name in fold.readers], self.alpha)
            edits, scale_H = fold.edits(read, scale_H)
            sample, dense = scaled_inputs(sample, dense, scale_H)
            dense, outliers = scaled_units(sample, dense, UNIT_ALPHA)
            notes.append(f"inputs smoothed by {scale_H.min():.2g} to {scale_H.max():.2g}, {outliers} outlier units")
        if self.router_bits < 16:
            for name in around().router(site.name):
                weight = edits[name] if name in edits else around().checkpoint.read(name)
                chosen = aligned(weight, sample.x_SH, site.top_k, self.router_bits)
                edits[name] = chosen.weight
                notes.append(f"router at {self.router_bits} bits of {chosen.ratio:.2f} of its range")
        stored, more = packed(sample, dense, self.bits, self.group_size, feedback=Feedback(lend=True))
        whole = LayerPlan.identity(site.num_experts, why=f"all experts at {self.bits} bits")
        return whole.valued(values.keep(stored, edits), "; ".join([*notes, more]))


class _Around:
    """The weights around the experts, which only the checkpoint itself has, whatever was planned for it before."""

    def __init__(self, source: Source) -> None:
        found: Source | None = source
        while not isinstance(found, Checkpoint):
            found = getattr(found, "source", None)
            if found is None:
                raise PlanError(f"eaquant changes norms and routers, and this source has experts only; {WITHOUT}")
        self.checkpoint = found
        self.model = found.skeleton()
        self.blocks = {block.name: block for block in blocks(self.model)}
        self.fold = cache(self._fold)

    def _fold(self, layer: str) -> Fold:
        try:
            return find_fold(self.checkpoint, self.model, self.blocks[layer])
        except PlanError as error:
            raise PlanError(f"{error}; {WITHOUT}") from None

    def router(self, layer: str) -> list[str]:
        """The stored matrices of the router, which must read what the experts read."""
        rows = [row.name for row in self.checkpoint.layer(layer).row_tensors if row.axis == 0 and row.part is None]
        names = [name for name in rows if name in self.fold(layer).readers]
        if not names:
            raise PlanError(f"layer {layer}: no matrix of its router reads what its experts read; give router_bits=16")
        return names
