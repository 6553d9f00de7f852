"""Eigenvectors of a positive semi-definite matrix from a few of its products: the randomized Nystrom approximation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_COLUMNS = 16  # that are multiplied at a time
_ROWS = 4096  # that are widened to float64 at a time


def nystrom(
    multiply: Callable[[Tensor], Tensor], size: int, rank: int, generator: torch.Generator | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Approximate a matrix A from below by one of lower rank.

    .. math:: A \succeq A\Omega\,(\Omega^\top A\Omega)^+\,(A\Omega)^\top = V \mathrm{diag}(\mu) V^\top

    for a random :math:`\Omega` with orthonormal columns; equal to A where its rank is no greater. It is computed of
    :math:`A + \nu I`, with ν at the rounding of A, which is taken out of μ at the end.

    Args:
        multiply: A times columns ``[P, k]``, which is called for ``rank`` of them in all.
        size: P.
        rank: r, from 1 to P.
        generator: Source of :math:`\Omega`.
        like: A tensor of the dtype and on the device to work in.

    Returns:
        V ``[P, r]``, with orthonormal columns, and μ ``[r]``, non-negative and descending.

    References:
        Martinsson & Tropp (2020), "Randomized numerical linear algebra: foundations and algorithms", section 14;
        Frangella, Tropp & Udell (2023), "Randomized Nystrom preconditioning", algorithm 2.1.
    """
    probes = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=like.dtype, device=like.device)).Q
    sketch = torch.empty_like(probes)
    for start in range(0, rank, _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        sketch[:, columns] = multiply(probes[:, columns])
    info = torch.finfo(like.dtype)
    unit = sketch.abs().max().clamp(min=info.tiny)  # A may be zero; squares of large entries overflow
    sketch /= unit
    shift = (info.eps * torch.linalg.matrix_norm(sketch)).clamp(min=info.tiny)
    sketch += shift * probes
    core = (probes.mT @ sketch).double()
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    inverse_root = vectors * torch.maximum(values, shift).rsqrt()  # no eigenvalue is below the shift but by rounding
    sketch = sketch @ inverse_root.to(like.dtype)
    del probes  # memory: the factorization takes some times that of the sketch
    left, singular, _ = torch.linalg.svd(sketch, full_matrices=False)
    return _orthonormal(left), unit * (singular.square() - shift).clamp(min=0)


def _orthonormal(vectors: Tensor) -> Tensor:
    """Take out of the columns what their factorization left of their products, to the rounding of their entries."""
    excess = -torch.eye(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start in range(0, len(vectors), _ROWS):
        rows = vectors[start : start + _ROWS].double()
        excess += rows.mT @ rows
    return vectors - vectors @ (excess / 2).to(vectors.dtype)  # the first step of Newton's iteration for a polar factor
