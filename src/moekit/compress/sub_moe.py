"""Sub-MoE: merge experts whose outputs are alike, by usage; optionally in the subspace their outputs share.

Paper: Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging, 2025 (n 3, arXiv 2506.23266).
Method: sim(i, j) = mean_t cos(E_i(x_t), E_j(x_t)) of all experts on the same tokens; k-means++ with the mean output as
    centroid; the experts of ``pool`` consecutive layers share one number of clusters. Per cluster and matrix,
    [W_1 | .. | W_n] = U S [V_1 | .. | V_n]^T and W = U S V_m^T with V_m = sum f_i V_i / sum f_i, f the usage.
    Untruncated this IS sum f_i W_i / sum f_i, and the plan says just that. With ``rank`` (the paper's dagger variant)
    the SVD is that of [W_1 S_1 | .. | W_n S_n], S_i S_i^T = X_i^T X_i + l I, cut to the rank, and two factors are kept.
Uses: algebra.cluster, algebra.basis, plan.merge, compress._sample, compress._factors
Differs: the router, of which the text says nothing, keeps its E rows, and those of a cluster call the merged expert. No
    cluster spans two layers: a pool's clusters go to its layers by the marginal drop of the objective (found on outputs
    joined over tokens). W = U U^T sum f_i W_i / sum f_i, so that only [R, R] sums of W_i x x^T W_i^T are held and none
    is inverted. l is 1e-6 of the mean variance. A cluster that no token chose is cut unwhitened. A matrix that factors
    would not shrink stays whole.
Claim: Mixtral-8x7B with 4 of 8 experts keeps 86 % of its accuracy, Qwen3-30B with 64 of 128 scores 0.57 (HC-SMoE 0.38).
Shown: lab.experiments.sub_moe
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from moekit.algebra import (
    Clustering,
    kmeans,
    low_rank,
    objective_curve,
    pooled_counts,
    second_moments,
    token_grams,
)
from moekit.compress._factors import biases, matrices, shrinks
from moekit.compress._layers import made
from moekit.compress._sample import NEEDS, WORK_BYTES, Sample, dense_outputs, hidden_units
from moekit.compress._select import check_keep, count_to_keep
from moekit.errors import OptionError
from moekit.formats import DenseBank, Factors, LowRankBank
from moekit.plan import values
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.merge import merged
from moekit.plan.planner import Evaluate, Method, Site, Source, sites_of
from moekit.plan.recombine import recombined_expert

if TYPE_CHECKING:
    from moekit.profile import LayerProfile, Profile

DAMPING = 1e-6
"""What is added to the inputs' second moments, as a share of their mean variance."""


@dataclass(frozen=True, kw_only=True)
class SubMoe(Method):
    """``keep`` is the share or number of clusters per layer, on average over a ``pool`` of consecutive layers, fewer
    where more would save nothing; ``rank`` cuts the merged matrices (0: not at all); outputs are compared on ``tokens``
    of the sample."""

    keep: float | int = 0.5
    rank: int = 0
    pool: int = 2
    tokens: int = 512
    seed: int = 0
    needs: ClassVar[frozenset[str]] = NEEDS | {"counts"}

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name, least in (("rank", 0), ("pool", 1), ("tokens", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"sub-moe: {name}={getattr(self, name)} is not possible; give {least} or more")

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        seen = self.observed(profile, source)
        sites = [site for site in sites_of(source) if not site.extra]
        makers = {}
        for first in range(0, len(sites), self.pool):
            pool = sites[first : first + self.pool]
            clusters = cache(partial(self._clusters, pool, seen, source))
            for site in pool:
                bank = partial(source.bank, site.name)
                makers[site.name] = partial(self._layer, site, clusters, seen[site.name], bank)
        return made(self, makers, profile, source)

    def _clusters(
        self, pool: Sequence[Site], seen: Mapping[str, LayerProfile], source: Source
    ) -> dict[str, Clustering]:
        """How the experts of each layer of a pool fall together."""
        total = sum(count_to_keep(self.keep, site) for site in pool)
        if total == sum(site.num_experts for site in pool):
            return {site.name: Clustering(np.arange(site.num_experts), 0.0) for site in pool}
        grams = {}
        for site in pool:
            most = max(1, min(self.tokens, WORK_BYTES // (8 * site.num_experts**2)))
            sample = Sample.of(seen[site.name], most=most)
            blocks = [token_grams(y.numpy()) for y in dense_outputs(source.bank(site.name), sample.x_SH)]
            grams[site.name] = np.concatenate(blocks)
        curves = [objective_curve(gram.sum(axis=0, dtype=float), seed=self.seed) for gram in grams.values()]
        counts = pooled_counts(curves, total)
        return {
            name: kmeans(gram, count, seed=self.seed) for (name, gram), count in zip(grams.items(), counts, strict=True)
        }

    def _layer(
        self,
        site: Site,
        clusters: Callable[[], Mapping[str, Clustering]],
        layer: LayerProfile,
        bank: Callable[[], DenseBank],
    ) -> LayerPlan:
        found = clusters()[site.name]
        leader_E = np.array([np.flatnonzero(found.labels == label)[0] for label in found.labels])
        count = len(set(leader_E.tolist()))
        why = f"merges {site.num_experts} experts into {count} by the likeness of their outputs, weighted by usage"
        if not found.settled:
            why += "; the clusters had not settled"
        plan = merged(leader_E, layer.total("counts"), None, why)
        return plan if not self.rank else cut(plan, bank(), Sample.of(layer), self.rank)


def cut(plan: LayerPlan, bank: DenseBank, sample: Sample, rank: int) -> LayerPlan:
    """The merged experts of a plan, each matrix projected on ``rank`` leading directions of its members' outputs."""
    labels = np.asarray(plan.slots)
    one = matrices(bank.expert(0))
    small = [part for part, matrix in one.items() if shrinks(matrix, rank)]
    if not small:
        return LayerPlan.aliased(plan.experts, plan.slots, why=f"{plan.why}; rank {rank} makes no matrix smaller")
    experts, means, unseen = [], [], []
    for index, expert in enumerate(plan.experts):
        mean = recombined_expert(bank, expert)
        found = {part: matrix.double() for part, matrix in matrices(mean).items()}
        spread, seen = output_moments(bank, np.flatnonzero(labels == index).tolist(), sample, small)
        unseen += [] if seen else [index]
        parts: dict[str, Factors | Tensor] = dict(found)
        for part in small:
            same = torch.eye(len(found[part]), dtype=torch.float64)
            basis = low_rank(same, min(rank, len(same)), spread[part]).left
            parts[part] = Factors(basis, basis.T @ found[part])
        experts.append(parts)
        means.append(mean)
    kept = LowRankBank.from_factors(experts, dtype=bank.dtype, activation=bank.activation, biases=biases(means))
    why = f"{', '.join(small)} cut to rank {rank} of the outputs they share on {len(sample)} sampled tokens"
    if unseen:
        why += f"; unwhitened because no sampled token chose them: stored experts {', '.join(map(str, unseen))}"
    return plan.valued(values.keep(kept), why)


def output_moments(
    bank: DenseBank, members: Sequence[int], sample: Sample, parts: Sequence[str]
) -> tuple[dict[str, Tensor], bool]:
    """``sum_i W_i (X_i^T X_i + l I) W_i^T`` [R, R] over a cluster's members, by part, each expert on its own tokens.

    Also whether there were any tokens; without, the moments are those of the weights.
    """
    outputs = {part: torch.zeros((), dtype=torch.float64) for part in parts}
    weights = dict(outputs)
    for member in members:
        expert, read_NH = bank.expert(member), sample.own(member).x_NH
        units_NI = hidden_units(expert, bank.activation, read_NH)
        for part, matrix in matrices(expert).items():
            if part in parts:
                wide = matrix.double()
                inputs = units_NI if part == "down" else read_NH
                outputs[part] = outputs[part] + second_moments(inputs.double() @ wide.T)
                weights[part] = weights[part] + wide @ wide.T
    seen = all(float(moments.trace()) > 0 for moments in outputs.values())
    if not seen:
        return weights, False
    scale = {part: DAMPING * outputs[part].trace() / weights[part].trace() for part in parts}
    return {part: outputs[part] + scale[part] * weights[part] for part in parts}, True
