"""A permutation that is learnt: a doubly stochastic matrix while it is searched for, a list of places afterwards.

Shapes by suffix: N things to permute, C permutations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .parts import Site, Spec, make
from .seen import Seen


def sinkhorn(logits_CNN: Tensor, iterations: int) -> Tensor:
    """Logarithms of a matrix whose rows and columns sum to 1, by normalising both in turn (columns last)."""
    for _ in range(iterations):
        logits_CNN = logits_CNN.log_softmax(-1).log_softmax(-2)
    return logits_CNN


class Permutation(nn.Module):
    """``count`` permutations of ``size`` things, as matrices [C, N, N]: row a, column b is 1 where a goes to place b.

    Gumbel-Sinkhorn (Mena et al. 2018; COMET's local search): Sinkhorn of (L + noise * Gumbel) / ``tau`` with a learnt
    L. Setting ``searching`` to False fixes the nearest permutation (Hungarian assignment), for good; ``tau`` and
    ``iterations`` are meant to be moved by a schedule meanwhile (1e-3 to 1e-7 and 20 to 150 in COMET).
    """

    order: Tensor

    def __init__(self, size: int, count: int = 1, *, tau: float = 1e-3, iterations: int = 20, noise: float = 0.0):
        super().__init__()
        if not tau > 0 or iterations < 1 or noise < 0:
            raise OptionError(
                f"a permutation needs tau > 0, iterations >= 1 and noise >= 0, got {tau:g}, {iterations}, {noise:g}"
            )
        self.tau, self.iterations, self.noise = tau, iterations, noise
        self.logits = nn.Parameter(torch.zeros(count, size, size))
        self.register_buffer("order", torch.full((count, size), -1, dtype=torch.int64))

    def initialise(self, std: float) -> None:
        init.normal_(self.logits, mean=0.0, std=std)
        init.constant_(self.order, -1)

    @property
    def searching(self) -> bool:
        return bool(self.order[0, 0] < 0)

    @searching.setter
    def searching(self, value: bool) -> None:
        if not value and self.searching:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Fix the permutations of the highest total L: what Sinkhorn's matrix tends to as tau goes to 0."""
        from scipy.optimize import linear_sum_assignment

        for place, matrix in enumerate(self.logits.detach().double().cpu()):
            self.order[place] = torch.as_tensor(linear_sum_assignment(matrix.numpy(), maximize=True)[1])

    def log_matrix(self) -> Tensor:
        """[C, N, N], the soft matrix."""
        logits = self.logits.float()
        if self.training and self.noise:
            logits = logits - self.noise * torch.empty_like(logits).exponential_().log()
        return sinkhorn(logits / self.tau, self.iterations)

    def matrix(self) -> Tensor:
        """[C, N, N]: soft while searching, of zeros and ones afterwards."""
        if self.searching:
            return self.log_matrix().exp()
        return nn.functional.one_hot(self.order, self.order.shape[1]).to(self.logits.dtype)


class Permuted(nn.Module):
    """The logits of another scorer with its choices permuted: a local search for any softmax router (COMET's "+").

    While it is searched for, ``log(softmax(of(x)) Pi)``, a mixture; afterwards the same logits in other places.
    """

    def __init__(
        self, site: Site, *, of: Spec = "linear", tau: float = 1e-3, iterations: int = 20, noise: float = 0.0
    ) -> None:
        super().__init__()
        from .scorers import SCORERS

        self.scorer = make("scorer", SCORERS, of, site)
        self.permutation = Permutation(site.choices, tau=tau, iterations=iterations, noise=noise)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        logits = self.scorer(x_TH, context)
        if not self.permutation.searching:
            return logits[:, self.permutation.order[0].argsort()]
        return logarithm(logits.float().softmax(-1) @ self.permutation.matrix()[0]).to(logits.dtype)


def logarithm(share: Tensor, least: float = 0.0) -> Tensor:
    """``log``, and -inf with no gradient for what is not above ``least``."""
    none = share <= least
    return share.masked_fill(none, 1).log().masked_fill(none, -torch.inf)


class PermutationEntropy(nn.Module):
    """Sum of the entropies of all rows and columns of a permutation searched for, in nats; 0 once it is fixed."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        permutation = getattr(seen.router.scorer, "permutation", None)
        if permutation is None:
            raise OptionError("the entropy of a permutation needs a scorer that permutes: permuted, or tree with one")
        if not permutation.searching:
            return permutation.logits.new_zeros(())
        log = permutation.log_matrix()
        share = log.exp()
        return -(share * log.clamp(min=-1e4)).sum() * 2
