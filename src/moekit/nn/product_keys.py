"""Keys that are pairs: the best of n^2 are found by looking at 2n.

Shapes by suffix: T tokens, G heads, R ranks, N keys of a side, D size of a key, M found, H hidden size, E choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .parts import Site


class ProductKeys(nn.Module):
    """The ``top`` of n^2 items for each of ``heads`` queries: ids ``row * n + column`` and scores [T, G, M].

    ``rank`` 1: the score of a pair is the sum of its halves' (product-key memory, Lample et al. 2019). The best M pairs
    lie among the best M rows with the best M columns, so the answer is exact. ``final=False`` returns all M^2 of those
    pairs instead (Hydra).

    ``rank`` above 1: ``s = S_row^T C S_col`` with a learnt core C [R, R] (UltraMem). Rows and columns are shortlisted
    by the leading singular vectors of C, then scored exactly: an approximation that misses pairs, among them all whose
    halves are both strongly negative.

    Queries are layer-normed; keys begin so that the mean of the best M scores is 1 (UltraMemV2, appendix A).

    Raises:
        OptionError: a size below 1, or more to find than there are keys of a side.
    """

    def __init__(
        self, size: int, *, keys: int, top: int, heads: int = 1, key: int = 32, rank: int = 1, final: bool = True
    ) -> None:
        super().__init__()
        if min(size, keys, heads, key, rank) < 1:
            raise OptionError(
                f"product keys need sizes from 1 on, got keys={keys}, heads={heads}, key={key}, rank={rank}"
            )
        if not 1 <= top <= keys:
            raise OptionError(f"top={top} of {keys} keys of a side: give 1 to {keys}")
        if rank > 1 and not final:
            raise OptionError("all pairs of the shortlists (final = false) can only be had with rank = 1")
        self.keys, self.top, self.heads, self.rank, self.final = keys, top, heads, rank, final
        self.query = nn.Linear(size, 2 * heads * rank * key, bias=False)
        self.norm = nn.LayerNorm(key)
        self.key = nn.Parameter(torch.zeros(2, heads, rank, keys, key))
        self.core = nn.Parameter(torch.zeros(heads, rank, rank)) if rank > 1 else None

    def initialise(self, std: float) -> None:
        init.normal_(self.query.weight, mean=0.0, std=math.sqrt(2 / (5 * self.query.in_features)))
        init.normal_(self.key, mean=0.0, std=self.scale() / math.sqrt(self.key.shape[-1]))
        if self.core is not None:
            init.copy_(self.core, self._first_core().expand_as(self.core))

    def scale(self) -> float:
        """Standard deviation of a side's scores at which the mean of the best M scores is 1, from a fixed draw."""
        best = self._sample()
        return float(best.mean()) ** (-1 if self.rank == 1 else -0.5)

    def spread(self) -> float:
        """Variance of the best M scores at the start."""
        best = self._sample()
        return float((best / best.mean()).var())

    def _sample(self) -> Tensor:
        row, column = torch.randn(2, 16, self.heads, self.rank, self.keys, generator=torch.Generator().manual_seed(0))
        core = None if self.core is None else self._first_core().expand(self.heads, -1, -1)
        return self._search(row, column, core)[1]

    def _first_core(self) -> Tensor:
        """Nearly of rank 1, so that a shortlist by the leading singular vectors means something from the start."""
        return torch.full((self.rank, self.rank), 1 / self.rank) + 0.1 * torch.eye(self.rank)

    def halves(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of rows and of columns [T, G, R, N]."""
        query = self.norm(self.query(x_TH).unflatten(1, (2, self.heads, self.rank, -1)))
        row, column = torch.einsum("tsgrd,sgrnd->stgrn", query, self.key)
        return row, column

    def scores(self, x_TH: Tensor) -> Tensor:
        """Of all pairs [T, G, N^2]."""
        row, column = self.halves(x_TH)
        if self.core is None:
            return (row[:, :, 0, :, None] + column[:, :, 0, None, :]).flatten(2)
        return torch.einsum("tgrn,grs,tgsm->tgnm", row, self.core, column).flatten(2)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, scores), each [T, G, M], best first (M^2 without ``final``, rows first)."""
        return self._search(*self.halves(x_TH), self.core)

    def _search(self, row: Tensor, column: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
        row_id, column_id = (one.topk(self.top, dim=-1).indices for one in leading(row, column, core))
        row, column = (
            half.gather(3, best[:, :, None].expand(-1, -1, self.rank, -1))
            for half, best in ((row, row_id), (column, column_id))
        )
        if core is None:
            grid = row[:, :, 0, :, None] + column[:, :, 0, None, :]
        else:
            grid = torch.einsum("tgrn,grs,tgsm->tgnm", row, core, column)
        item = (row_id[..., None] * self.keys + column_id[:, :, None, :]).flatten(2)
        if not self.final:
            return item, grid.flatten(2)
        score, place = grid.flatten(2).topk(self.top, dim=-1)
        return item.gather(2, place), score


def leading(row: Tensor, column: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the sides [T, G, R, N] are shortlisted by [T, G, N]: their scores by the core's leading singular vectors."""
    if core is None:
        return row[:, :, 0], column[:, :, 0]
    left, _, right = torch.linalg.svd(core.detach().to(torch.float32))
    sign = torch.where(left[:, :, :1].sum(1, keepdim=True) < 0, -1, 1)  # a pair of vectors is known up to a sign
    u, v = (left[:, :, :1] * sign)[..., 0].to(row.dtype), (right[:, :1] * sign)[:, 0].to(row.dtype)
    return torch.einsum("tgrn,gr->tgn", row, u), torch.einsum("tgrn,gr->tgn", column, v)


class ProductKeyScorer(nn.Module):
    """Logits of n^2 experts from 2n keys: for routers that want the logits of all of them.

    ``key`` is the size of half a key. Raises :class:`OptionError` where the number of experts is no square.
    """

    def __init__(self, site: Site, *, key: int = 32) -> None:
        super().__init__()
        side = math.isqrt(site.choices)
        if side * side != site.choices:
            raise OptionError(f"product keys address a square of experts, and {site.choices} is none")
        self.keys = ProductKeys(site.hidden_size, keys=side, top=1, key=key)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        return self.keys.scores(x_TH)[:, 0]
