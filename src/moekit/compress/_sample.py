"""What the sampled tokens of a layer say about its experts: their inputs, hidden units and outputs, in bounded memory.

A profile keeps the tokens (``hidden``) and how they were routed; the weights come from the layer's bank. One layer at a
time, one expert or one block of tokens at a time, in float32 whatever the weights are stored in.
Shapes by suffix: S sampled tokens, N some of them, K slots, E experts, C a chunk of experts, H hidden size, I hidden
units.
"""
# ruff: noqa: N802, N815 (shape suffixes in the names of fields)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from moekit.algebra import second_moments
from moekit.bank import Activation, ExpertBank, ExpertWeights
from moekit.contract import Routing
from moekit.errors import ProfileError
from moekit.kernels import forward

if TYPE_CHECKING:
    from moekit.profile import LayerProfile

NEEDS = frozenset({"hidden", "sample_expert", "sample_weight"})
"""Statistics a method names in its ``needs`` to ask for a :class:`Sample`."""
WORK_BYTES = 2**28
"""What one block of outputs, or one chunk of second moments, may take; results do not depend on it."""


class Own(NamedTuple):
    """The sampled tokens of one expert: which they are [N], what it read [N, H], its combine weights [N]."""

    token_N: Tensor
    x_NH: Tensor
    weight_N: Tensor


@dataclass(frozen=True)
class Sample:
    """Sampled tokens of one layer: inputs ``x_SH`` in float32 and the routing they had (-1 pads, or was dropped)."""

    x_SH: Tensor
    routing: Routing
    num_experts: int

    @classmethod
    def of(cls, layer: LayerProfile, domains: Sequence[str] = (), most: int | None = None) -> Sample:
        """The layer's sample: of the named domains (all if none are), the first ``most`` tokens, domains in turn.

        Raises ProfileError where the profile has none, of these domains or at all.
        """
        x, expert, weight = (layer.array(name) for name in ("hidden", "sample_expert", "sample_weight"))
        kept = layer.sample_rows(domains)[:most]
        if not len(kept):
            raise ProfileError(f"layer {layer.name} has no sampled tokens to work with: profile again with more")
        routing = Routing(torch.from_numpy(expert[kept]).long(), torch.from_numpy(weight[kept]))
        return cls(torch.from_numpy(x[kept]).float(), routing, layer.num_experts)

    def __len__(self) -> int:
        return len(self.x_SH)

    @cached_property
    def count_E(self) -> np.ndarray:
        """Sampled tokens of each expert."""
        return np.array([len(self.own(e).token_N) for e in range(self.num_experts)])

    def starved(self, least: int = 1) -> tuple[int, ...]:
        """Experts with fewer sampled tokens than that: what is fitted to their data means little, or nothing."""
        return tuple(np.flatnonzero(self.count_E < least).tolist())

    def own(self, expert: int) -> Own:
        """The tokens that chose the expert, in order; a token that names it twice has its weights summed."""
        chose_SK = self.routing.expert == expert
        token_N = chose_SK.any(1).nonzero()[:, 0]
        weight_N = (self.routing.weight * chose_SK).sum(1)[token_N]
        return Own(token_N, self.x_SH[token_N], weight_N)


@torch.no_grad()
def hidden_units(weights: ExpertWeights, activation: Activation, x_NH: Tensor) -> Tensor:
    """[N, I] in float32: what the down projection of one expert reads."""
    bias = weights.gate_up_bias
    return activation(linear(x_NH.float(), weights.gate_up.float(), None if bias is None else bias.float()))


@torch.no_grad()
def output(weights: ExpertWeights, activation: Activation, x_NH: Tensor) -> Tensor:
    """[N, H] in float32: what one expert returns, unweighted."""
    bias = weights.down_bias
    units_NI = hidden_units(weights, activation, x_NH)
    return linear(units_NI, weights.down.float(), None if bias is None else bias.float())


def moe_output(sample: Sample, bank: ExpertBank) -> Tensor:
    """[S, H]: what the layer's routed experts add under the sampled routing."""
    return forward(bank, sample.x_SH, sample.routing)


def replaced_error(sample: Sample, bank: ExpertBank, expert: int, instead: ExpertWeights) -> float:
    """``||MoE(x) - MoE'(x)||_F`` over the sample, where MoE' differs from MoE in this one expert.

    Exact: the layer's output is a weighted sum, so only the expert's own tokens change, each by its weight times the
    change of the expert's output. The eps of MC-MoE's bit allocation, with the sample as one batch.
    """
    own = sample.own(expert)
    before, after = (output(weights, bank.activation, own.x_NH) for weights in (bank.expert(expert), instead))
    change_NH = own.weight_N[:, None].double() * (before.double() - after.double())
    return float(torch.linalg.vector_norm(change_NH))


def dense_outputs(bank: ExpertBank, x_NH: Tensor, max_bytes: int = WORK_BYTES) -> Iterator[Tensor]:
    """Outputs of ALL experts on the same tokens, a block of tokens at a time: [E, n, H] each, in order."""
    size = max(1, max_bytes // (4 * bank.num_experts * bank.hidden_size))
    for x_nH in x_NH.split(size):
        y_EnH = torch.empty(bank.num_experts, *x_nH.shape)
        for e in range(bank.num_experts):
            y_EnH[e] = output(bank.expert(e), bank.activation, x_nH)
        yield y_EnH


class Likeness(NamedTuple):
    """Of every two experts' outputs on common tokens: mean cosine [E, E], and inner product summed over tokens."""

    cosine_EE: Tensor
    gram_EE: Tensor


def output_likeness(bank: ExpertBank, x_NH: Tensor, max_bytes: int = WORK_BYTES) -> Likeness:
    """Sub-MoE's ``mean_t cos(Y_i[t], Y_j[t])`` and what distances of outputs need: ``||Y_i - Y_j||^2`` is
    ``gram[i, i] + gram[j, j] - 2 gram[i, j]``. Float64; an output of zero has cosine 0 with all."""
    cosine_EE, gram_EE = (torch.zeros(bank.num_experts, bank.num_experts, dtype=torch.float64) for _ in range(2))
    for y_EnH in dense_outputs(bank, x_NH, max_bytes):
        flat = y_EnH.flatten(1)
        gram_EE += (flat @ flat.T).double()
        y_EnH /= torch.linalg.vector_norm(y_EnH, dim=-1, keepdim=True).clamp(min=1e-30)
        cosine_EE += (flat @ flat.T).double()
    return Likeness(cosine_EE / max(len(x_NH), 1), gram_EE)


class Moments(NamedTuple):
    """Second moments of a chunk of experts: ``input`` [C, H, H] of what gate and up read, ``unit`` [C, I, I] of what
    down reads, over ``tokens`` [C] of each. Zeros where an expert has no tokens."""

    experts: tuple[int, ...]
    tokens: tuple[int, ...]
    input_CHH: Tensor
    unit_CII: Tensor


def expert_moments(
    sample: Sample,
    bank: ExpertBank,
    *,
    weighted: bool = False,
    lend: bool = False,
    dtype: torch.dtype = torch.float32,
    max_bytes: int = WORK_BYTES,
) -> Iterator[Moments]:
    """Second moments of all experts, as many at a time as fit into ``max_bytes``, in order.

    Args:
        weighted: each token counts its combine weight (MoEQuant's affinity) instead of 1, in both moments.
        lend: an expert without tokens of its own takes all sampled tokens, unweighted (EAQuant).
        dtype: of the sums, float32 or float64.
    """
    element = torch.zeros((), dtype=dtype).element_size()
    size = max(1, max_bytes // (element * (bank.hidden_size**2 + bank.intermediate_size**2)))
    for first in range(0, bank.num_experts, size):
        experts = range(first, min(first + size, bank.num_experts))
        made = Moments(
            tuple(experts),
            tuple(int(sample.count_E[e]) for e in experts),
            torch.empty(len(experts), bank.hidden_size, bank.hidden_size, dtype=dtype),
            torch.empty(len(experts), bank.intermediate_size, bank.intermediate_size, dtype=dtype),
        )
        for place, e in enumerate(experts):
            own = sample.own(e)
            borrowed = lend and not len(own.token_N)
            read_NH = sample.x_SH if borrowed else own.x_NH
            weight_N = own.weight_N.to(dtype) if weighted and not borrowed else None
            units_NI = hidden_units(bank.expert(e), bank.activation, read_NH)
            made.input_CHH[place] = second_moments(read_NH.to(dtype), weight_N)
            made.unit_CII[place] = second_moments(units_NI.to(dtype), weight_N)
        yield made
