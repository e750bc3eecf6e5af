"""Experts as bags of neurons: handing each neuron of a dropped expert to the most similar neuron that stays.

Neuron j of an expert is (g_j, u_j, d_j), its gate and up rows and its down column (with the biases that move with
them); an expert is the sum of its neurons (DERN, 2025, steps 2 and 3). Nothing is widened: each adopted neuron joins
the pool of the one it is most like, and a pool becomes its weighted mean.
Shapes by suffix: E experts, D dropped experts, I hidden units, F features of a neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moekit.bank import ExpertWeights
from moekit.errors import OptionError
from moekit.formats import DenseBank

Likeness = Literal["joined", "mean"]
"""The cosine of the joined (g, u, d), or the mean of the three cosines."""
Adopted = tuple[ExpertWeights, int, Tensor, Tensor, Tensor]
"""A dropped expert's weights, its id, the neurons it gives, the neurons these join, and their signs."""


@dataclass(frozen=True, eq=False)
class NeuronMap:
    """Where the neurons of dropped experts went, as a plan can store it.

    ``dropped`` lists the D experts; for neuron i of ``dropped[k]``, ``expert[k, i]`` and ``unit[k, i]`` (int64 [D, I])
    name the kept expert (its id in the bank) and its neuron, both -1 where the neuron is discarded; ``sign`` (int8, 1
    or -1) what u and d are multiplied by on the way; ``likeness`` (float32) the best cosine found, also of the
    discarded, -inf where none was looked for.
    """

    dropped: tuple[int, ...]
    expert: Tensor
    unit: Tensor
    sign: Tensor
    likeness: Tensor


def assign_neurons(
    bank: DenseBank,
    kept: Sequence[int],
    *,
    alpha: float = 0.4,
    likeness: Likeness = "joined",
    canonical: bool = False,
    block: int = 4096,
) -> NeuronMap:
    """The most similar neuron of the ``kept`` experts for every neuron of the others, where the cosine is >= ``alpha``.

    Ties go to the lowest kept expert and its lowest neuron. (u, d) and (-u, -d) are the same neuron of a gated expert:
    with ``canonical`` the better sign counts (and is stored), without it such twins look opposite, as in the paper.
    ``alpha`` above 1 discards everything, which is plain pruning. Works through ``block`` dropped neurons at a time
    against one kept expert. Raises :class:`OptionError` on ids that do not exist or repeat, on none to keep, and on
    ``canonical`` without a gate.
    """
    _check(bank, kept, canonical)
    dropped = tuple(e for e in range(bank.num_experts) if e not in set(kept))
    shape = (len(dropped), bank.intermediate_size)
    found = NeuronMap(
        dropped,
        torch.full(shape, -1),
        torch.full(shape, -1),
        torch.ones(shape, dtype=torch.int8),
        torch.full(shape, -torch.inf),
    )
    if alpha > 1 or not dropped:
        return found
    # In gated experts the features of u and d, whose sign is free together, begin after those of g.
    free_from = _width(bank.expert(0)) if canonical else None
    at_once = max(1, block // bank.intermediate_size)
    for start in range(0, len(dropped), at_once):
        run = slice(start, start + at_once)
        left_NF = torch.cat([_features(bank.expert(e), likeness) for e in dropped[run]])
        for expert in sorted(kept):
            right_IF = _features(bank.expert(expert), likeness)
            value, unit, sign = (t.view(-1, shape[1]) for t in _nearest(left_NF, right_IF, free_from))
            better = value > found.likeness[run]
            found.likeness[run][better] = value[better]
            found.expert[run][better] = expert
            found.unit[run][better] = unit[better]
            found.sign[run][better] = sign[better]
    discarded = found.likeness < alpha
    found.expert[discarded] = -1
    found.unit[discarded] = -1
    found.sign[discarded] = 1
    return found


def merge_neurons(bank: DenseBank, kept: Sequence[int], map_: NeuronMap, weight_E: Tensor) -> DenseBank:
    """The ``kept`` experts, in that order, each neuron the mean of its pool weighted by its members' experts.

    A neuron that adopts none, and one whose adopted are equal to it, stays bit for bit: what is added is the weighted
    mean difference to it, summed in at least float32. Weights of a pool that sum to zero count equally. Biases of the
    down projection stay those of the kept expert. Raises :class:`OptionError` on weights that are negative or not
    finite, and on a map that points to an expert that is not kept.
    """
    if weight_E.shape != (bank.num_experts,) or not torch.isfinite(weight_E).all() or (weight_E < 0).any():
        raise OptionError(f"merging needs {bank.num_experts} finite weights of at least 0, one per expert")
    strangers = set(map_.expert.unique().tolist()) - {-1, *kept}
    if strangers:
        raise OptionError(f"the neuron map points to expert {min(strangers)}, which is not kept")
    weight_E = weight_E.double()
    merged = []
    for expert in kept:
        weights = bank.expert(expert)
        merged.append(_merged(weights, _adopted(bank, expert, map_), float(weight_E[expert]), weight_E))
    return DenseBank.stack(merged, bank.activation)


def _merged(
    own: ExpertWeights,
    adopted: list[Adopted],
    weight: float,
    weight_E: Tensor,
) -> ExpertWeights:
    """One expert with its pools merged."""
    if not adopted:
        return own
    units = own.down.shape[1]
    size, count = torch.full((units,), weight, dtype=torch.float64), torch.ones(units, dtype=torch.float64)
    for _, source, _, target, _ in adopted:
        size.index_add_(0, target, weight_E[source].expand(len(target)))
        count.index_add_(0, target, torch.ones(len(target), dtype=torch.float64))
    rows_IF = _rows(own)
    change_IF = torch.zeros_like(rows_IF)
    gated = own.gate_up.shape[0] == 2 * units
    for other, source, mine, target, sign in adopted:
        share = torch.where(size[target] > 0, weight_E[source] / size[target], 1 / count[target]).to(rows_IF.dtype)
        moved = _rows(other, mine)
        if gated:
            moved[:, _width(other) :] *= sign[:, None].to(moved.dtype)
        change_IF.index_add_(0, target, share[:, None] * (moved - rows_IF[target]))
    return _from_rows(rows_IF + change_IF, own)


def _adopted(bank: DenseBank, expert: int, map_: NeuronMap) -> list[Adopted]:
    """What every dropped expert gives to this one, if anything."""
    found = []
    for row, source in enumerate(map_.dropped):
        mine = (map_.expert[row] == expert).nonzero()[:, 0]
        if len(mine):
            found.append((bank.expert(source), source, mine, map_.unit[row, mine], map_.sign[row, mine]))
    return found


def _columns(expert: ExpertWeights, units: Tensor | slice = slice(None)) -> list[Tensor]:
    """The parts of the neurons ``units``, [n, .] each: g (if gated), u, d; biases with the rows they belong to."""
    size = expert.down.shape[1]
    wide = torch.promote_types(expert.down.dtype, torch.float32)
    parts = [rows[units].to(wide) for rows in expert.gate_up.detach().split(size)]
    if expert.gate_up_bias is not None:
        biases = [bias[units].to(wide) for bias in expert.gate_up_bias.detach().split(size)]
        parts = [torch.cat([part, bias[:, None]], dim=1) for part, bias in zip(parts, biases, strict=True)]
    return [*parts, expert.down.detach().T[units].to(wide)]


def _rows(expert: ExpertWeights, units: Tensor | slice = slice(None)) -> Tensor:
    """Everything that moves with a neuron, one row each: [n, F] in at least float32."""
    return torch.cat(_columns(expert, units), dim=1)


def _width(expert: ExpertWeights) -> int:
    """Columns of one part of gate_up, its bias included."""
    return expert.gate_up.shape[1] + (expert.gate_up_bias is not None)


def _from_rows(rows_IF: Tensor, like: ExpertWeights) -> ExpertWeights:
    """The inverse of :func:`_rows`, in the dtypes of ``like`` and with its down bias."""
    units, hidden = like.down.shape[1], like.gate_up.shape[1]
    width = _width(like)
    parts = [rows_IF[:, width * i : width * (i + 1)] for i in range(like.gate_up.shape[0] // units)]
    gate_up = torch.cat([part[:, :hidden] for part in parts]).to(like.gate_up.dtype)
    bias = None
    if like.gate_up_bias is not None:
        bias = torch.cat([part[:, hidden] for part in parts]).to(like.gate_up_bias.dtype)
    down = rows_IF[:, width * len(parts) :].T.contiguous().to(like.down.dtype)
    return ExpertWeights(gate_up, down, bias, like.down_bias)


def _features(expert: ExpertWeights, likeness: Likeness) -> Tensor:
    """Rows [I, F] whose inner products are the likeness of neurons; zero for a zero neuron."""
    columns = _columns(expert)
    if likeness == "mean":
        return torch.cat([normalize(part, dim=1) for part in columns], dim=1) / len(columns) ** 0.5
    return normalize(torch.cat(columns, dim=1), dim=1)


def _nearest(left_NF: Tensor, right_IF: Tensor, free_from: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every left neuron: the best likeness [N], the first right neuron that has it, and the sign.

    From feature ``free_from`` on, the sign of the product is free.
    """
    if free_from is None:
        value, unit = (left_NF @ right_IF.T).max(dim=1)
        return value, unit, torch.ones_like(unit, dtype=torch.int8)
    free_NI = left_NF[:, free_from:] @ right_IF[:, free_from:].T
    value, unit = (left_NF[:, :free_from] @ right_IF[:, :free_from].T + free_NI.abs()).max(dim=1)
    flipped = free_NI.gather(1, unit[:, None])[:, 0] < 0
    return value, unit, torch.where(flipped, -1, 1).to(torch.int8)


def _check(bank: DenseBank, kept: Sequence[int], canonical: bool) -> None:
    wrong = [e for e in kept if not 0 <= e < bank.num_experts]
    if wrong:
        raise OptionError(f"expert {wrong[0]} does not exist: this bank has experts 0 to {bank.num_experts - 1}")
    if not kept or len(set(kept)) != len(kept):
        raise OptionError(f"kept experts {list(kept)} must be one or more different ids")
    if canonical and not bank.activation.gated:
        raise OptionError("the sign of a neuron is free in gated experts only: leave canonical off for these")
