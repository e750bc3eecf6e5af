"""Factors of few columns: one matrix alone, or several that share a basis on their output or on their input side.

All three are the best approximation of their rank in the squared error sum_i ||(W_i - W'_i) M_i^(1/2)||^2, where the
second moments M_i of the inputs (none: the identity) turn an error of weights into one of outputs. No inverse of M is
needed, so singular moments do no harm: the projection on the leading left singular vectors U of the whitened weights
is W' = U U^T W, the whitening undone by itself; with shared rows the kept singular values are inverted, never M.
Computed in float64. Shapes by suffix: N matrices that share, R rows, C columns, K rank; leading axes batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import OptionError

UNUSABLE = "weights or second moments hold NaN or infinite values: they cannot be factorised"


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right``: left [..., R, K] = U sqrt(S), right [..., K, C] = sqrt(S) V^T.

    ``discarded`` [...] is the squared error, whitened where moments were given; so in the other two.
    """

    left: Tensor
    right: Tensor
    discarded: Tensor

    @property
    def num_parameters(self) -> int:
        return self.left.numel() + self.right.numel()

    def weight(self) -> Tensor:
        """The product, [..., R, C]."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class SharedColumns:
    """``W_i = basis @ blocks[i]``: one output basis [R, K] with orthonormal columns, blocks [N, K, C] (S V_i^T)."""

    basis: Tensor
    blocks: Tensor
    discarded: Tensor

    @property
    def num_parameters(self) -> int:
        return self.basis.numel() + self.blocks.numel()

    def weight(self) -> Tensor:
        """Every matrix, [N, R, C]."""
        return self.basis @ self.blocks

    def mean(self, share_N: Tensor) -> Tensor:
        """The one matrix [R, C] whose block is the weighted mean of the blocks (Sub-MoE's merge: W = U S V_m^T).

        At full rank this is the weighted mean of the matrices, by linearity. Weights that sum to zero count equally.
        """
        share_N = share_N.to(self.blocks)
        share_N = share_N / share_N.sum() if share_N.sum() > 0 else torch.full_like(share_N, 1 / len(share_N))
        return self.basis @ torch.einsum("n,nkc->kc", share_N, self.blocks)


@dataclass(frozen=True, eq=False)
class SharedRows:
    """``W_i = cores[i] @ basis``: one input basis [K, C] (orthonormal rows if unwhitened), cores [N, R, K]."""

    cores: Tensor
    basis: Tensor
    discarded: Tensor

    @property
    def num_parameters(self) -> int:
        return self.cores.numel() + self.basis.numel()

    def weight(self) -> Tensor:
        """Every matrix, [N, R, C]."""
        return self.cores @ self.basis


def low_rank(weight: Tensor, rank: int, moments: Tensor | None = None) -> LowRank:
    """Each matrix [..., R, C] alone, by truncated SVD; ``moments`` [..., C, C] or [C, C] whiten its inputs.

    Raises :class:`OptionError` for a rank below 1 or above min(R, C).
    """
    rows, columns = weight.shape[-2:]
    _check(rank, min(rows, columns), f"a matrix [{rows}, {columns}]")
    wide = weight.detach().double()
    if moments is None and columns < rows:
        turned = low_rank(wide.transpose(-2, -1), rank)
        return LowRank(turned.right.transpose(-2, -1), turned.left.transpose(-2, -1), turned.discarded)
    gram = _gram(wide, moments)
    vectors, discarded = _leading(gram, rank)
    right = vectors.transpose(-2, -1) @ wide
    root = right.square().sum(-1).sqrt().sqrt()
    return LowRank(vectors * root[..., None, :], right / torch.where(root > 0, root, 1.0)[..., None], discarded)


def shared_columns(weight_NRC: Tensor, rank: int | None = None, moments: Tensor | None = None) -> SharedColumns:
    """The SVD of ``[W_1 | ... | W_N]`` [R, N * C], cut to ``rank`` (None: full), whose left factor the matrices share.

    ``moments`` are those of each matrix's own inputs [N, C, C] or of all [C, C]: then the SVD is that of
    ``[W_1 S_1 | ... | W_N S_N]`` with S_i S_i^T = M_i, undone in the blocks. Raises :class:`OptionError` for a rank
    below 1 or above min(R, N * C).
    """
    number, rows, columns = weight_NRC.shape
    full = min(rows, number * columns)
    rank = full if rank is None else rank
    _check(rank, full, f"{number} matrices [{rows}, {columns}] side by side")
    wide = weight_NRC.detach().double()
    vectors, discarded = _leading(_gram(wide, moments).sum(0), rank)
    return SharedColumns(vectors, vectors.T @ wide, discarded)


def shared_rows(weight_NRC: Tensor, rank: int | None = None, moments_CC: Tensor | None = None) -> SharedRows:
    """The SVD of the stacked ``[W_1; ...; W_N]`` [N * R, C], cut to ``rank``, whose right factor the matrices share.

    The best A_i and B in sum_i ||W_i - A_i B||^2: B = V^T, A_i = W_i V (MoLE's conversion, phase 2; with rank R every
    core is square). A shared input side can only have shared moments [C, C], which the sum over the matrices' tokens
    gives. Raises :class:`OptionError` for a rank below 1 or above min(N * R, C), and for moments per matrix.
    """
    number, rows, columns = weight_NRC.shape
    full = min(number * rows, columns)
    rank = full if rank is None else rank
    _check(rank, full, f"{number} stacked matrices [{rows}, {columns}]")
    wide = weight_NRC.detach().double()
    flat = wide.flatten(0, 1)
    gram = flat.T @ flat
    if moments_CC is None:
        vectors, discarded = _leading(gram, rank)
        return SharedRows(wide @ vectors, vectors.T.contiguous(), discarded)
    if moments_CC.shape != gram.shape:
        raise OptionError(
            f"matrices that share rows need the moments [{columns}, {columns}] of all their inputs together, "
            f"got {list(moments_CC.shape)}"
        )
    root = _square_root(moments_CC.double())
    vectors, discarded = _leading(root @ gram @ root, rank)
    out = root @ vectors
    energy = torch.einsum("ck,cd,dk->k", out, gram, out)
    inverse = torch.where(energy > energy.max() * 1e-14, 1 / energy, 0.0)
    return SharedRows(wide @ out, inverse[:, None] * (out.T @ gram), discarded)


def low_rank_parameters(rows: int, columns: int, rank: int, number: int = 1) -> int:
    """Numbers stored by ``number`` matrices factored one by one."""
    return number * rank * (rows + columns)


def shared_columns_parameters(rows: int, columns: int, rank: int, number: int) -> int:
    """Numbers stored by matrices that share their output basis."""
    return rank * (rows + number * columns)


def shared_rows_parameters(rows: int, columns: int, rank: int, number: int) -> int:
    """Numbers stored by matrices that share their input basis."""
    return rank * (columns + number * rows)


def _gram(weight: Tensor, moments: Tensor | None) -> Tensor:
    """``W M W^T`` [..., R, R]: the Gram matrix of the whitened rows, without whitening them."""
    if moments is None:
        return weight @ weight.transpose(-2, -1)
    columns = weight.shape[-1]
    if moments.shape not in ((columns, columns), (*weight.shape[:-2], columns, columns)):
        raise OptionError(
            f"weights {list(weight.shape)} need moments [{columns}, {columns}] or one of these per matrix, "
            f"got {list(moments.shape)}"
        )
    return weight @ moments.double() @ weight.transpose(-2, -1)


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors [..., n, rank] of the largest eigenvalues, descending, and the sum [...] of the others.

    The sign of each is fixed by its largest entry, so that equal input gives equal factors whatever the library.
    """
    if not torch.isfinite(gram).all():
        raise OptionError(UNUSABLE)
    symmetric = (gram + gram.transpose(-2, -1)) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    kept = vectors[..., -rank:].flip(-1)
    largest = kept.gather(-2, kept.abs().argmax(dim=-2, keepdim=True))
    return kept * torch.where(largest < 0, -1.0, 1.0), values[..., :-rank].clamp_min(0).sum(-1)


def _square_root(moments: Tensor) -> Tensor:
    if not torch.isfinite(moments).all():
        raise OptionError(UNUSABLE)
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _check(rank: int, full: int, what: str) -> None:
    if not 1 <= rank <= full:
        raise OptionError(f"rank {rank} is not possible for {what}: its full rank is {full}, use 1 to {full}")
