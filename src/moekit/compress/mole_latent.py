"""MoLE: experts of a group read one shared projection to a narrow space, and keep a small matrix each.

Paper: Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models, 2025 (n 71, arXiv
    2503.23100; its second version is named MoLAE).
Method: per group and matrix, min sum_i ||W_i - A_i B||^2. Phase 1: each W_i becomes its best approximation of rank
    ``reduce``. Phase 2: SVD of the stacked [W_1; ..; W_g]; B = V_l^T, A_i = W_i V_l. Gate and up have bases of their
    own; down stays whole (version 1) unless ``down``, then W_i = B A_i (version 2).
Uses: algebra.basis, formats.LatentBank, compress._factors, compress._sample, train.parametrise
Differs: the group's size, and how r is found in phase 1, are left open by the text read: 4 neighbours, and no phase 1
    unless asked for. ``whiten`` weighs the error by the second moments of the group's inputs, which the paper does not.
Claim: trained so from scratch at the size of GPT-2, 40 % fewer parameters at a comparable loss; converted models keep
    their scores when gate and up are converted.
Shown: lab.experiments.mole_latent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.algebra import low_rank, second_moments, shared_columns, shared_rows
from moekit.blocks import MoEBlock
from moekit.compress._factors import biases, matrices
from moekit.compress._sample import NEEDS, Sample, hidden_units
from moekit.errors import OptionError
from moekit.formats import DenseBank, LatentBank
from moekit.plan import values
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site
from moekit.train.forms import Form, Tied
from moekit.train.parametrise import held, parametrise

if TYPE_CHECKING:
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class MoleLatent(LayerPlanner):
    """``rank`` is the size of the latent space (0: the width of an expert), ``group`` how many neighbouring experts
    share one (0: all of a layer); ``reduce`` is the rank of phase 1 (0: none)."""

    rank: int = 0
    group: int = 4
    reduce: int = 0
    down: bool = False
    whiten: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "group", "reduce"):
            if getattr(self, name) < 0:
                raise OptionError(f"mole-latent: {name}={getattr(self, name)} is not possible; give 0 or more")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """A profile only where inputs weigh."""
        return NEEDS if self.whiten else frozenset()

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        dense, size = bank(), self.group or site.num_experts
        sample = Sample.of(layer) if self.whiten else None
        groups = [range(first, min(first + size, site.num_experts)) for first in range(0, site.num_experts, size)]
        latent = self.rank or min(dense.intermediate_size, dense.hidden_size)
        stored = converted(dense, groups, latent, down=self.down, reduce=self.reduce, sample=sample)
        whole = sum(tensor.numel() for tensor in dense.tensors().values())
        share = sum(tensor.numel() for tensor in stored.tensors().values()) / whole
        what = "all matrices" if self.down else "gate and up" if dense.activation.gated else "up"
        first = f", reduced to rank {self.reduce} first" if self.reduce else ""
        why = f"{what}{first}, from {latent} latent dimensions per group of {size}: {share:.0%} of the numbers"
        return LayerPlan.identity(site.num_experts, why=why).valued(values.keep(stored))


def converted(
    bank: DenseBank,
    groups: Sequence[Sequence[int]],
    latent: int,
    *,
    down: bool = False,
    reduce: int = 0,
    sample: Sample | None = None,
) -> LatentBank:
    """The experts of each group (which follow one another and are all of the bank) on shared bases.

    Args:
        reduce: rank that each matrix is cut to first; 0 or anything from full rank on leaves it.
        sample: whose inputs weigh the error; a group that no token chose is unweighted.

    Raises:
        OptionError: a latent size above what the matrices of a group span, or weights that are not finite.
    """
    split = [matrices(bank.expert(e)) for e in range(bank.num_experts)]
    parts = [part for part in split[0] if part != "down" or down]
    bases: dict[str, list[Tensor]] = {part: [] for part in parts}
    cores = [dict(found) for found in split]
    for group in groups:
        for part in parts:
            stack = torch.stack([split[e][part] for e in group]).double()
            if 0 < reduce < min(stack.shape[1:]):
                stack = low_rank(stack, reduce).weight()
            basis, found = _shared(stack, latent, _moments(bank, group, part, sample), part == "down")
            bases[part].append(basis)
            for e, core in zip(group, found, strict=True):
                cores[e][part] = core
    index = [number for number, group in enumerate(groups) for _ in group]
    stacked = {part: torch.stack(found) for part, found in bases.items()}
    experts = (bank.expert(e) for e in range(bank.num_experts))
    return LatentBank.from_factors(
        stacked, cores, index, dtype=bank.dtype, activation=bank.activation, biases=biases(experts)
    )


def _shared(stack_NRC: Tensor, latent: int, moments: Tensor | None, columns: bool) -> tuple[Tensor, Tensor]:
    """(basis, cores): W_i = cores[i] @ basis, or basis @ cores[i] where the matrices share columns."""
    if columns:
        made = shared_columns(stack_NRC, latent, moments)
        return made.basis, made.blocks
    rows = shared_rows(stack_NRC, latent, moments)
    return rows.basis, rows.cores


def _moments(bank: DenseBank, group: Sequence[int], part: str, sample: Sample | None) -> Tensor | None:
    """Second moments of what a group's matrices read: of its tokens [H, H], of down's units [N, I, I]; None if none."""
    if sample is None:
        return None
    owns = [sample.own(e).x_NH for e in group]
    if not sum(map(len, owns)):
        return None
    if part != "down":
        return second_moments(torch.cat(owns).double())
    units = (hidden_units(bank.expert(e), bank.activation, x) for e, x in zip(group, owns, strict=True))
    return torch.stack([second_moments(u.double()) for u in units])


class Latent(Form):
    """Trained as one basis per group [n, l, K] and a core per expert [E, R, l]: W_e = core[e] @ basis[group[e]]."""

    def __init__(self, group: Sequence[int], latent: int) -> None:
        super().__init__()
        self.group, self.latent = list(group), latent

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        bases, cores = [], torch.empty(*weight_ERK.shape[:2], self.latent, dtype=weight_ERK.dtype)
        for group in range(max(self.group) + 1):
            members = [e for e, g in enumerate(self.group) if g == group]
            basis, found = _shared(weight_ERK[members], self.latent, None, columns=False)
            bases.append(basis)
            cores[members] = found.to(cores.dtype)
        return torch.stack(bases).to(weight_ERK.dtype), cores.to(weight_ERK.device)

    def forward(self, *held: Tensor) -> Tensor:
        bases, cores = held
        return cores @ bases[self.group]


def train_latent(block: MoEBlock, group: Sequence[int], latent: int) -> None:
    """Let gate and up of a live block be trained as latent experts, ``group`` that of every expert. Down stays plain.

    Raises OptionError for a latent size above what a group spans, UnsupportedModelError for experts not in stacks.
    """
    gated = block.bank().activation.gated
    forms: list[Form] = [Latent(group, latent) for _ in range(1 + gated)]
    turn = iter([*forms, Tied(range(block.num_experts))])
    parametrise(block, lambda: next(turn))


def trained_bank(block: MoEBlock, dtype: torch.dtype) -> LatentBank:
    """What :func:`train_latent` and training have made of the experts."""
    bases: dict[str, Tensor] = {}
    cores: list[dict[str, Tensor]] = [{} for _ in range(block.num_experts)]
    group: list[int] = []
    for part, form, tensors in held(block):
        if isinstance(form, Latent):
            group, bases[part] = form.group, tensors[0].detach()
        for core, tensor in zip(cores, tensors[-1].detach(), strict=True):
            core[part] = tensor
    bank = block.bank()
    beside = biases(bank.expert(e) for e in range(block.num_experts))
    return LatentBank.from_factors(bases, cores, group, dtype=dtype, activation=bank.activation, biases=beside)
