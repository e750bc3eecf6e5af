"""A gate of soft decision trees that becomes exactly sparse while it trains.

Shapes by suffix: T tokens, J trees, N leaves (one per choice), H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import carry
from .parts import Site
from .permutation import Permutation, logarithm
from .seen import Seen

ENTROPY = "leaf entropy"
_REACHED = 1e-5
"""A leaf of less probability counts as out of reach (COMET)."""


def smooth_step(t: Tensor, width: float) -> Tensor:
    """0 up to -width/2, 1 from width/2 on, ``-2 t^3 / width^3 + 3 t / (2 width) + 1/2`` between."""
    t = (t / width).clamp(-0.5, 0.5)
    return -2 * t**3 + 1.5 * t + 0.5


def leaves(go_TJN: Tensor) -> Tensor:
    """Probabilities [T, J, N] of N leaves from those of going left at each of N - 1 nodes, numbered as in a heap.

    Node i has the children 2i + 1 (left) and 2i + 2; a number from N - 1 on is a leaf. N need be no power of two.
    """
    inner = go_TJN.shape[-1]
    level, first = go_TJN.new_ones(*go_TJN.shape[:-1], 1), 0
    done = []
    while first < inner:
        count = min(level.shape[-1], inner - first)
        go, here = go_TJN[..., first : first + count], level[..., :count]
        done.append(level[..., count:])
        first += level.shape[-1]
        level = torch.stack((here * go, here * (1 - go)), dim=-1).flatten(-2)
    return torch.cat([*done, level], dim=-1)


class Tree(nn.Module):
    """COMET: the logits are log weights, of J trees with one leaf per choice each; -inf for what no tree reaches.

    ``weight = sum_j softmax_{j, leaf}(a_j + log v_j) Pi_j`` with leaf probabilities v and linear leaf scores a, one
    softmax over the leaves of all trees. ``width`` is that of the smooth step: a narrow one decides sooner.
    ``trees``: the layer's k if None, hence at most k choices once every node has decided. ``permute``: none, one
    permutation "shared" by the trees, or one "each". Softmax makes the same weights of these logits again; the
    selector is "support".
    """

    def __init__(
        self,
        site: Site,
        *,
        trees: int | None = None,
        width: float = 1.0,
        permute: str = "none",
        tau: float = 1e-3,
        iterations: int = 20,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        count = site.top_k if trees is None else trees
        if count < 1 or not width > 0:
            raise OptionError(f"a tree gate needs one tree at least and a positive width, got {count} and {width:g}")
        if permute not in ("none", "shared", "each"):
            raise OptionError(f"permute={permute!r} of a tree gate: choose none, shared or each")
        self.width = width
        self.nodes = nn.Parameter(torch.zeros(count, site.choices - 1, site.hidden_size))
        self.weight = nn.Parameter(torch.zeros(count, site.choices, site.hidden_size))
        self.bias = nn.Parameter(torch.zeros(count, site.choices))
        self.permutation = (
            None
            if permute == "none"
            else Permutation(
                site.choices, count if permute == "each" else 1, tau=tau, iterations=iterations, noise=noise
            )
        )

    def initialise(self, std: float) -> None:
        init.uniform_(self.nodes, -self.width / 100, self.width / 100)
        init.uniform_(self.weight, -0.05, 0.05)
        init.zeros_(self.bias)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        x_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
        go = smooth_step(torch.einsum("th,jnh->tjn", x_TH, self.nodes.to(x_TH.dtype)), self.width)
        leaf_TJN = leaves(go)
        log_TJN = logarithm(leaf_TJN, _REACHED)
        carry(context).state[ENTROPY] = -(leaf_TJN * log_TJN.masked_fill(log_TJN == -torch.inf, 0)).sum((1, 2))
        score_TJN = torch.einsum("th,jnh->tjn", x_TH, self.weight.to(x_TH.dtype)) + self.bias
        share_TJN = (score_TJN + log_TJN).flatten(1).softmax(-1).view_as(leaf_TJN)
        if self.permutation is None:
            return logarithm(share_TJN.sum(1))
        matrix_JNN = self.permutation.matrix().to(share_TJN.dtype).expand(share_TJN.shape[1], -1, -1)
        return logarithm(torch.einsum("tjn,jnm->tm", share_TJN, matrix_JNN))


class LeafEntropy(nn.Module):
    """The mean over tokens of the entropies of all trees' leaves, in nats: minimising it makes a tree gate sparse."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        entropy = carry(seen.context).state.get(ENTROPY)
        if entropy is None or len(entropy) != len(seen.x_TH):
            raise OptionError("the entropy of leaves needs the scorer 'tree', token by token")
        return seen.mean(entropy[:, None]).sum()
