"""n^2 experts put together from n first and n second halves, all of them computed for the price of 2n.

Shapes by suffix: T tokens, G heads, N halves of a side, W units of a half, H hidden size.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import carry, recomputed
from .tally import Tally


class HalvesRouter(nn.Module):
    """Probabilities of the first and of the second halves [T, G, N], each head's summing to 1 (Monet).

    Logits are normed over the batch, head by head; those above the quantile ``1 - keep / N`` of a normal distribution
    are kept (the highest at least), and the softmax is over the logits of those as they were. No sorting. In evaluation
    the running statistics are used, so that a token is routed by itself.
    """

    def __init__(self, size: int, sides: int, heads: int, keep: float) -> None:
        super().__init__()
        self.first = nn.Linear(size, heads * sides, bias=False)
        self.second = nn.Linear(size, heads * sides, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm1d(heads, affine=False) for _ in range(2))
        self.heads = heads
        self.threshold = NormalDist().inv_cdf(1 - keep / sides)

    def forward(self, x_TH: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``real_T`` (bool) marks tokens; of padding no statistics are taken. None: all are."""
        first, second = (
            self._kept(linear(x_TH).unflatten(1, (self.heads, -1)), norm, real_T)
            for linear, norm in zip((self.first, self.second), self.norms, strict=True)
        )
        return first, second

    def _kept(self, logits_TGN: Tensor, norm: nn.Module, real_T: Tensor | None) -> Tensor:
        wide = logits_TGN.to(torch.promote_types(logits_TGN.dtype, torch.float32))
        if not len(wide):
            return wide
        with torch.no_grad():
            if real_T is None:
                normed = self._normed(logits_TGN, norm)
            else:
                normed = torch.zeros_like(logits_TGN)
                if bool(real_T.any()):
                    normed[real_T] = self._normed(logits_TGN[real_T], norm)
            limit = normed.amax(-1, keepdim=True).clamp(max=self.threshold)
        return wide.masked_fill(normed < limit, -torch.inf).softmax(-1)

    def _normed(self, logits_TGN: Tensor, norm: nn.Module) -> Tensor:
        if self.training and recomputed():  # the same numbers; the running statistics have seen this pass
            return F.batch_norm(logits_TGN, None, None, training=True)
        return norm(logits_TGN)


class Decomposed(nn.Module):
    """``y = sum_h sum_ij g1_hi g2_hj E_ij(x)`` over all n^2 experts, factorised (Monet, sections 3.2 and 3.3).

    ``split`` "horizontal": ``E_ij(x) = V_j f(U_i x) + b_j``. "vertical": each expert's hidden units and outputs are cut
    in two; with ``h1 = f(U1_i x + c1_i)`` and ``h2 = f(U2_j x + c2_j)`` its output is ``[V11_i h1 + V12_i h2 + b1_i,
    V21_j h1 + V22_j h2 + b2_j]``. f is the squared ReLU. ``width`` is the hidden size of an expert; ``keep`` the number
    of halves each of ``heads`` heads keeps on average. One router serves ``every`` layers, the first of them has it.

    ``uniformity`` and ``ambiguity`` weigh the two auxiliary losses: halves used evenly, heads sure of their choice.
    ``mask`` (bool [N, N], or None) switches experts off where it is False; it can be set at any time.

    Raises:
        OptionError: sizes that do not fit, an unknown split, or a layer that borrows a router nobody has.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        sides: int,
        heads: int,
        keep: float,
        width: int,
        split: str = "vertical",
        every: int = 1,
        uniformity: float = 1e-3,
        ambiguity: float = 1e-3,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        if min(sides, heads, width, every) < 1 or not 0 < keep < sides:
            raise OptionError(
                f"sides={sides}, heads={heads}, width={width}, every={every}: 1 or more, and keep below sides"
            )
        if split not in ("vertical", "horizontal"):
            raise OptionError(f"split={split!r} of experts: choose vertical or horizontal")
        vertical = split == "vertical"
        if vertical and (width % 2 or size % 2):
            raise OptionError(f"a vertical split halves width={width} and the hidden size {size}: make them even")
        self.vertical, self.weights = vertical, {"uniformity": uniformity, "ambiguity": ambiguity}
        self.owner = layer - layer % every
        self.router = HalvesRouter(size, sides, heads, keep) if layer == self.owner else None
        units, out = (width // 2, size // 2) if vertical else (width, size)
        self.up = nn.Parameter(torch.zeros(1 + vertical, sides, units, size))
        self.up_bias = nn.Parameter(torch.zeros(2, sides, units)) if vertical else None
        # vertical: [half of the output, half of the hidden units]; horizontal: one of each
        self.down = nn.Parameter(torch.zeros(1 + vertical, 1 + vertical, sides, out, units))
        self.down_bias = nn.Parameter(torch.zeros(1 + vertical, sides, out))
        self.mask: Tensor | None = None
        self.tally = Tally(2 * sides)

    def initialise(self, std: float) -> None:
        for weight in (self.up, self.down):
            init.normal_(weight, mean=0.0, std=std)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[.., H]."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        first, second = (g.to(x_TH.dtype) for g in self.halves(x_TH, context or Context()))
        if context is not None:  # halves of either side, those of the first before those of the second
            own = slice(None) if context.padding is None else ~context.padding
            self.tally.add(torch.cat([(g[own] > 0).sum((0, 1)) for g in (first, second)]), context)
        combine = self._vertical if self.vertical else self._horizontal
        return combine(x_TH, first, second).reshape(hidden_states.shape)

    def halves(self, x_TH: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What the router gives the first and the second halves [T, G, N]: this layer's, or the one it borrows."""
        state, names = carry(context).state, (f"first halves {self.owner}", f"second halves {self.owner}")
        if self.router is None:
            if names[0] not in state:
                raise OptionError(f"a decomposed layer borrows the router of layer {self.owner}, which has none")
            return state[names[0]], state[names[1]]
        first, second = self.router(x_TH, None if context.padding is None else ~context.padding)
        state |= {names[0]: first, names[1]: second}
        if self.training:
            self._lose(first, second, context)
        return first, second

    def _lose(self, first_TGN: Tensor, second_TGN: Tensor, context: Context) -> None:
        tokens = slice(None) if context.padding is None else ~context.padding
        both = torch.stack((first_TGN[tokens], second_TGN[tokens]))
        tiny = torch.finfo(both.dtype).tiny
        values = {"uniformity": -both.mean(1).clamp(min=tiny).log().mean(), "ambiguity": (1 - both.amax(-1)).mean()}
        for name, weight in self.weights.items():
            carry(context).lose(name, weight * values[name])

    def pairs(self, first_TGN: Tensor, second_TGN: Tensor) -> Tensor:
        """[T, N, N]: the weight of every expert, those switched off at 0."""
        pairs = torch.einsum("tgi,tgj->tij", first_TGN, second_TGN)
        return pairs if self.mask is None else pairs * self.mask.to(pairs)

    def _horizontal(self, x_TH: Tensor, first: Tensor, second: Tensor) -> Tensor:
        inner = squared_relu(torch.einsum("nuh,th->tnu", self.up[0], x_TH))
        if self.mask is None:
            mixed = torch.einsum("tgi,tgj,tiu->tju", first, second, inner)
            share = second.sum(1)
        else:
            pairs = self.pairs(first, second)
            mixed, share = torch.einsum("tij,tiu->tju", pairs, inner), pairs.sum(1)
        return torch.einsum("nou,tnu->to", self.down[0, 0], mixed) + share @ self.down_bias[0]

    def _vertical(self, x_TH: Tensor, first: Tensor, second: Tensor) -> Tensor:
        assert self.up_bias is not None
        inner = squared_relu(torch.einsum("snuh,th->stnu", self.up, x_TH) + self.up_bias[:, None])
        if self.mask is None:
            shares = (first.sum(1), second.sum(1))
            crossed = (
                torch.einsum("tgi,tgu->tiu", first, torch.einsum("tgj,tju->tgu", second, inner[1])),
                torch.einsum("tgj,tgu->tju", second, torch.einsum("tgi,tiu->tgu", first, inner[0])),
            )
        else:
            pairs = self.pairs(first, second)
            shares = (pairs.sum(2), pairs.sum(1))
            crossed = torch.einsum("tij,tju->tiu", pairs, inner[1]), torch.einsum("tij,tiu->tju", pairs, inner[0])
        halves = []
        for half in (0, 1):
            own = inner[half] * shares[half][..., None]
            out = torch.einsum("nou,tnu->to", self.down[half, half], own)
            out = out + torch.einsum("nou,tnu->to", self.down[half, 1 - half], crossed[half])
            halves.append(out + shares[half] @ self.down_bias[half])
        return torch.cat(halves, dim=-1)


def squared_relu(x: Tensor) -> Tensor:
    return x.relu().square()
