"""Statistics of the Fisher on the two sides of a weight, and what bases are made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._linalg import eigh, inverse_lower
from ._opaque import opaque
from ._sides import Side
from ._types import LowRank, Packed


def kronecker_statistics(z: Packed, left: Side, right: Side) -> tuple[Packed, Packed]:
    r"""Return ``cov_L`` and ``cov_R``, with :math:`F \approx cov_R \otimes cov_L`, from one random gradient z.

    With rows (z = dᵀa) these are K-FAC's :math:`E[aa^\top]`, over rows with a gradient, and
    :math:`\sum_\text{rows} dd^\top`. A dense z gives :math:`Z^\top Z / t` and :math:`ZZ^\top / t` with
    :math:`t = \|Z\|_F`: exact in expectation, up to the scale t, where F is a Kronecker product.

    Args:
        z: A draw with :math:`E[zz^\top] = F`.
        left: The n-sided factor.
        right: The m-sided factor.
    """
    if isinstance(z, LowRank):
        counts = (z.d != 0).any(-1, keepdim=True).to(z.a.dtype)  # a row without gradient (masked, padded) is none
        total = counts.sum((-2, -1), keepdim=True).clamp(min=1)
        a, d = left.split(z.a), right.split(z.d)
        return LowRank(left.split(z.a * (counts / total)), a), LowRank(d, d)
    norm = torch.linalg.matrix_norm(z, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    cov_l, cov_r = left.gram(z, z), right.gram(z.mT, z.mT)
    return cov_l / like_blocks(norm, cov_l), cov_r / like_blocks(norm, cov_r)


def like_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Give ``x`` ``[*groups, 1, 1]`` the block axis of ``blocks``."""
    return x.unsqueeze(-3) if blocks.ndim > x.ndim else x


def _trace(cov: Tensor, groups: int) -> Tensor:
    """Return the trace over blocks, one for each group: ``[*groups]``."""
    diagonal = cov.diagonal(dim1=-2, dim2=-1)
    return diagonal.flatten(groups).sum(-1)


def factored_damping(
    cov_l: Tensor, cov_r: Tensor, m: int, n: int, groups: int, damping: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Split γ between the sides: :math:`\rho_L = \pi\sqrt\gamma`, :math:`\rho_R = \sqrt\gamma/\pi`.

    π is the root of the ratio of the mean traces. Each is kept above what float arithmetic needs for a Cholesky
    factorization of its side.

    Args:
        cov_l: Statistics of the n side.
        cov_r: Statistics of the m side.
        m: Length of the m side.
        n: Length of the n side.
        groups: Number of leading group axes.
        damping: γ, 0-d.

    Returns:
        The two damping terms, one for each group: ``[*groups]``.

    References:
        Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature", section
        6.3.
    """
    info = torch.finfo(cov_l.dtype)
    trace_l, trace_r = _trace(cov_l, groups), _trace(cov_r, groups)
    pi = ((trace_l / n).clamp(min=info.tiny**0.5) / (trace_r / m).clamp(min=info.tiny**0.5)).sqrt()
    root = damping.sqrt()
    return torch.maximum(root * pi, 8 * info.eps * trace_l), torch.maximum(root / pi, 8 * info.eps * trace_r)


@opaque("(Tensor cov, Tensor rho, Tensor previous) -> Tensor", result=lambda cov, rho, previous: torch.empty_like(cov))
def whitening_root(cov: Tensor, rho: Tensor, previous: Tensor) -> Tensor:
    r"""Return the upper triangular C with :math:`CC^\top = (cov + \rho I)^{-1}`.

    Args:
        cov: Positive semi-definite, ``[..., n, n]``.
        rho: Damping, ``[*groups]``.
        previous: The basis to keep where the factorization fails.
    """
    rho, damped = rho.reshape(rho.shape + (1,) * (cov.ndim - 1 - rho.ndim)), cov.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(rho)
    lower, info = torch.linalg.cholesky_ex(damped)
    root = inverse_lower(lower).mT
    sound = (info == 0) & rho.squeeze(-1).isfinite() & root.isfinite().flatten(-2).all(-1)
    return torch.where(sound[..., None, None], root, previous).contiguous()


@opaque("(Tensor cov, Tensor previous) -> Tensor", result=lambda cov, previous: torch.empty_like(cov))
def eigenbasis(cov: Tensor, previous: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices, as columns.

    Args:
        cov: Shape ``[..., n, n]``.
        previous: The basis to keep where entries are not finite.
    """
    good = cov.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    _, vectors = eigh(torch.where(good, cov, 0))
    return torch.where(good, vectors, previous).contiguous()
