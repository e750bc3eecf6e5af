"""Widths by what experts matter: an exact choice of 1, 2 or 3 bits for every expert of a layer within a number of bits.

The pre-loading mixed precision quantisation of MC-MoE (arXiv 2410.06270), which its successor uses unchanged.
Shapes by suffix: E experts, B widths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.algebra import Asymmetric, Grid, Symmetric, allocate_bits
from moekit.compress._calibrated import joined, packed
from moekit.compress._checks import check_group_size
from moekit.compress._sample import NEEDS, Sample, replaced_error
from moekit.compress._scores import summed
from moekit.errors import OptionError
from moekit.formats import PackedBank
from moekit.plan import values
from moekit.plan.document import LayerPlan

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile

WIDTHS = (1, 2, 3)
AT_LEAST = {3: 1, 2: 1}
"""Every layer has an expert of three bits and one of two."""
NEEDED = NEEDS | {"counts", "selected_probability"}
RATIOS = (1.0, 0.95, 0.9, 1.05, 1.1)
"""Ends of the range that are tried, as multiples of a group's own."""
EXPONENTS = (1.0, 1.5, 2.0)
"""Of how often an expert is chosen, of its router probability then, and of the error its rounding makes."""


def check_average(method: str, bits: float, group_size: int) -> None:
    """OptionError unless the widths can have this average and groups this size."""
    if not WIDTHS[0] < bits <= WIDTHS[-1]:
        raise OptionError(f"{method}: bits={bits} is the average of 1, 2 and 3 bits: give more than 1, at most 3")
    check_group_size(method, group_size)


def grid(width: int, group_size: int) -> Grid:
    """Signs times the mean magnitude at one bit, else from the least to the greatest of a group."""
    if width == 1:
        return Symmetric(bits=1, group_size=group_size)
    return Asymmetric(bits=width, group_size=group_size, ratios=RATIOS)


def rounded(sample: Sample, bank: DenseBank, group_size: int) -> tuple[list[PackedBank], str]:
    """All experts at each of :data:`WIDTHS`, and what happened at the widest (fallbacks are the same at all)."""
    made = [packed(sample, bank, width, group_size, grid=lambda bits: grid(bits, group_size)) for width in WIDTHS]
    return [one for one, _ in made], made[-1][1]


def importance(layer: LayerProfile, exponents: Sequence[float], domains: Sequence[str] = ()) -> np.ndarray:
    """[E]: share of choices ** alpha * share of the router probability of those who chose ** beta."""
    shares = (summed(layer, name, domains) for name in ("counts", "selected_probability"))
    chosen_E, weight_E = (share / max(float(share.sum()), 1e-300) for share in shares)
    return chosen_E ** exponents[0] * weight_E ** exponents[1]


def losses(sample: Sample, bank: DenseBank, banks: Sequence[PackedBank]) -> np.ndarray:
    """[E, B]: how far the layer's output moves (Frobenius norm) if this expert alone is rounded to this width."""
    return np.array([[replaced_error(sample, bank, e, b.expert(e)) for b in banks] for e in range(bank.num_experts)])


def mixed(
    method: str,
    layer: LayerProfile,
    bank: DenseBank,
    bits: float,
    group_size: int,
    exponents: Sequence[float] = EXPONENTS,
    domains: Sequence[str] = (),
) -> LayerPlan:
    """The layer with the widths of least ``sum_e importance_e * eps_eb ** gamma`` among those of ``bits`` on average.

    OptionError where so few bits do not leave one expert of three and one of two.
    """
    sample, experts = Sample.of(layer, domains), bank.num_experts
    budget, least = math.floor(experts * bits + 1e-9), sum(AT_LEAST) + experts - len(AT_LEAST)
    if budget < least:
        raise OptionError(
            f"{method}: bits={bits} leaves {experts} experts {budget} bits, but one of them has three and one two: "
            f"give {least / experts:.4g} or more"
        )
    banks, notes = rounded(sample, bank, group_size)
    loss_EB = importance(layer, exponents, domains)[:, None] * losses(sample, bank, banks) ** exponents[2]
    widths = allocate_bits(loss_EB, WIDTHS, budget, at_least=AT_LEAST)
    made = joined([banks[WIDTHS.index(width)].select([e]) for e, width in enumerate(widths)])
    many = Counter(widths)
    counts = ", ".join(f"{many[width]} at {width}" for width in WIDTHS)
    whole = LayerPlan.identity(experts, why=f"experts by bits: {counts} ({sum(widths)} of {budget} spent)")
    return whole.valued(values.keep(made), notes)
