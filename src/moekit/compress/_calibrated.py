"""One layer's experts rounded to their grids so that their outputs on sampled tokens change least.

The one road from a profile's sample to a stored bank for every method that quantises with GPTQ: second moments of a
chunk of experts, the engine on gate-and-up (one set of moments for both) and on down (moments of the hidden units that
the unrounded expert makes), codes packed at once and forgotten. Memory is bounded by the chunk, not by the layer.
Shapes by suffix: C a chunk of experts, K input columns of a matrix, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor

from moekit.algebra import Asymmetric, GptqReport, Grid, Rounded, as_codes, as_ternary, gptq
from moekit.compress._checks import check_group_size
from moekit.compress._sample import Moments, Sample, expert_moments
from moekit.errors import OptionError
from moekit.formats import WIDTHS, DenseBank, PackedBank, TernaryBank

PARTS = ("gate_up", "down")
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Steps of the damping, as a share of the mean variance. Few tokens tell little of K x K moments, and feedback along
what they happen to show does harm: down projections calibrated at the usual 0.01 on as many tokens as columns came out
worse than rounded to nearest on other text of the embedded model, and better once damped by a quarter of K / N."""
CHUNK_BYTES = 2**24
"""Of second moments held at once: many small experts, or up to :data:`TOGETHER` large ones in four times as much.
Factors, weights and what rounding works on take some ten times as much."""
TOGETHER = 3
"""Large experts that are rounded together: one alone spends its time on calls, a column each."""
FEW = 16
"""Tokens below which an expert is named as having seen little."""

Bank = TypeVar("Bank", PackedBank, TernaryBank)
Parts = Mapping[str, Rounded]
"""Of one expert: "gate_up" and "down", on their grids. Empty where the expert is left as it was."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How :func:`~moekit.algebra.gptq` is to be run. ``damping`` is the least (see :data:`DAMPING`); ``weighted``: a
    token counts its combine weight instead of 1; ``lend``: an expert that got no token takes all of them."""

    damping: float = 0.01
    columns: bool = True
    blocks: bool = True
    weighted: bool = False
    lend: bool = False


def check_bits(method: str, bits: Iterable[int], group_size: int) -> None:
    """OptionError unless packed integers can have these widths and this group size."""
    for one in bits:
        if one not in WIDTHS:
            raise OptionError(f"{method}: bits={one} is a precision no format has; use one of {WIDTHS}")
    check_group_size(method, group_size)


def packed(
    sample: Sample,
    bank: DenseBank,
    bits: int | Sequence[int],
    group_size: int | Sequence[int] = 64,
    *,
    grid: Callable[[int], Grid] | None = None,
    feedback: Feedback = Feedback(),
) -> tuple[PackedBank, str]:
    """Experts as packed integers, ``bits`` and ``group_size`` one for all or one each (16 bits: left as it was), and a
    line on what happened.

    ``grid`` gives the grid of a width, with groups of ``group_size``; None is the packed bank's own, asymmetric.
    """
    widths = [bits] * bank.num_experts if isinstance(bits, int) else list(bits)
    sizes = [group_size] * bank.num_experts if isinstance(group_size, int) else list(group_size)
    assert len(widths) == len(sizes) == bank.num_experts

    def make(experts: Sequence[int], parts: Sequence[Parts]) -> PackedBank:
        made = [
            {name: as_codes(found[name]) if found else getattr(bank, name)[e] for name in PARTS}
            for e, found in zip(experts, parts, strict=True)
        ]
        return PackedBank.from_codes(
            made, [widths[e] for e in experts], [sizes[e] for e in experts], **_kind(bank, experts)
        )

    def fit(width: int, size: int) -> Grid | None:
        if width == 16:
            return None
        return grid(width) if grid else Asymmetric(bits=width, group_size=size)

    return _calibrated(sample, bank, list(map(fit, widths, sizes)), make, feedback)


def ternary(sample: Sample, bank: DenseBank, grid: Grid, *, feedback: Feedback) -> tuple[TernaryBank, str]:
    """Experts on a ternary grid of whole rows, in the dictionary code, and a line on what happened."""

    def make(experts: Sequence[int], parts: Sequence[Parts]) -> TernaryBank:
        made = [{name: as_ternary(found[name]) for name in PARTS} for found in parts]
        return TernaryBank.from_symbols(made, **_kind(bank, experts))

    return _calibrated(sample, bank, [grid] * bank.num_experts, make, feedback)


def joined(banks: Sequence[Bank]) -> Bank:
    """The experts of several banks of one layer as one bank, in order: what ``select`` takes apart."""
    first, stored, before = banks[0], {}, 0
    for bank in banks:
        for name, tensor in bank.stored.items():
            expert, _, rest = name.partition(".")
            stored[f"{before + int(expert)}.{rest}"] = tensor
        before += bank.num_experts
    fields: dict[str, Any] = {name: tuple(chain(*(getattr(bank, name) for bank in banks))) for name in first.EACH}
    for name in first.EACH_PART:
        fields[name] = {part: tuple(chain(*(getattr(bank, name)[part] for bank in banks))) for part in first.PARTS}
    return replace(first, stored=stored, **fields)


def _calibrated(
    sample: Sample,
    bank: DenseBank,
    grids: Sequence[Grid | None],
    make: Callable[[Sequence[int], Sequence[Parts]], Bank],
    feedback: Feedback,
) -> tuple[Bank, str]:
    account, banks = _Account(), []
    kind = {"weighted": feedback.weighted, "lend": feedback.lend}
    for moments in expert_moments(sample, bank, **kind, max_bytes=chunk_bytes(bank)):
        found: dict[int, dict[str, Rounded]] = {e: {} for e in moments.experts}
        for name, hessian_CKK in zip(PARTS, (moments.input_CHH, moments.unit_CII), strict=True):
            for grid, damping, places in _alike(moments, grids, feedback, hessian_CKK.shape[-1], len(sample)):
                experts = [moments.experts[place] for place in places]
                made, report = gptq(
                    getattr(bank, name)[experts],
                    hessian_CKK[places],
                    grid,
                    damping=damping,
                    column_feedback=feedback.columns,
                    block_feedback=feedback.blocks,
                )
                account.add(experts, report, damping)
                for index, e in enumerate(experts):
                    found[e][name] = made.expert(index)
        banks.append(make(moments.experts, [found[e] for e in moments.experts]))
    return joined(banks), account.text(sample, feedback.lend)


def chunk_bytes(bank: DenseBank) -> int:
    """What the second moments of the experts that are treated together may take."""
    one = 4 * (bank.hidden_size**2 + bank.intermediate_size**2)
    return max(CHUNK_BYTES, min(TOGETHER * one, 4 * CHUNK_BYTES))


def _alike(
    moments: Moments, grids: Sequence[Grid | None], feedback: Feedback, columns: int, lent: int
) -> list[tuple[Grid, float, list[int]]]:
    """Places in the chunk of the experts that are rounded together: those of one grid and one damping."""
    places: dict[tuple[Grid, float], list[int]] = {}
    for place, (e, tokens) in enumerate(zip(moments.experts, moments.tokens, strict=True)):
        grid = grids[e]
        if grid is not None:
            level = damping(columns, tokens or lent * feedback.lend)
            places.setdefault((grid, max(feedback.damping, level)), []).append(place)
    return [(*job, found) for job, found in places.items()]


def damping(columns: int, tokens: int) -> float:
    """The first of :data:`DAMPING` that is at least a quarter of ``columns / tokens``, or the last."""
    wanted = columns / (4 * max(tokens, 1))
    return next((step for step in DAMPING if step >= wanted), DAMPING[-1])


@dataclass
class _Account:
    """What the engine reported, over all experts of a layer."""

    fallbacks: dict[str, set[int]] = field(default_factory=dict)
    damped: set[int] = field(default_factory=set)
    error: float = 0.0
    rounding: float = 0.0

    def add(self, experts: Sequence[int], report: GptqReport, damping: float) -> None:
        self.error += sum(report.error)
        self.rounding += sum(report.rounding_error)
        self.damped |= {experts[i] for i, used in enumerate(report.damping) if used > damping}
        for index, why in report.fallbacks.items():
            self.fallbacks.setdefault(why, set()).add(experts[index])

    def text(self, sample: Sample, lent: bool) -> str:
        starved = sample.starved()
        few = set(sample.starved(FEW)) - set(starved)
        damped = self.damped.difference(*self.fallbacks.values())
        notes = [f"on {len(sample)} sampled tokens"]
        if self.rounding > 0:
            notes.append(f"output error {self.error / self.rounding:.3g} of what rounding to nearest makes")
        notes += [f"rounded to nearest because {why}: {_named(who)}" for why, who in sorted(self.fallbacks.items())]
        for what, who in (
            ("lent all tokens for want of their own", starved if lent else ()),
            (f"fewer than {FEW} tokens", few),
            ("damped more to be positive definite", damped),
        ):
            notes += [f"{what}: {_named(who)}"] if who else []
        return "; ".join(notes)


def _kind(bank: DenseBank, experts: Sequence[int]) -> dict[str, Any]:
    """What stored banks are told besides their matrices."""
    weights = [bank.expert(e) for e in experts]
    biases: list[dict[str, Tensor | None]] = [{"gate_up": w.gate_up_bias, "down": w.down_bias} for w in weights]
    return {
        "dtype": bank.dtype,
        "activation": bank.activation,
        "biases": biases if bank.gate_up_bias is not None else (),
    }


def _named(experts: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(experts)))
