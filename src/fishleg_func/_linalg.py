"""Products, inverses and eigenvectors of matrices with structure.

Products and inverses use triangles and symmetry by halves, at half the FLOPs or less. The halves of a matrix are
treated alike until they are small; all but the smallest are then plain matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 256  # sizes from which halving saves more than the smaller products lose


def inverse_lower(a: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix.

    Args:
        a: Shape ``[..., n, n]``.
    """
    n = a.shape[-1]
    if n <= LEAF:
        eye = torch.eye(n, dtype=a.dtype, device=a.device).expand_as(a)
        inverse: Tensor = torch.linalg.solve_triangular(a, eye, upper=False)
        return inverse
    h = n // 2
    top, bottom = inverse_lower(a[..., :h, :h]), inverse_lower(a[..., h:, h:])
    result = torch.zeros_like(a)
    result[..., :h, :h], result[..., h:, h:] = top, bottom
    result[..., h:, :h] = -bottom @ (a[..., h:, :h] @ top)
    return result


def outer_square(a: Tensor) -> Tensor:
    r"""Return :math:`aa^\top`.

    Args:
        a: Shape ``[..., n, k]``.
    """
    n = a.shape[-2]
    if n <= LEAF:
        return a @ a.mT
    h = n // 2
    result = a.new_empty(*a.shape[:-1], n)
    result[..., :h, :h], result[..., h:, h:] = outer_square(a[..., :h, :]), outer_square(a[..., h:, :])
    below = a[..., h:, :] @ a[..., :h, :].mT
    result[..., h:, :h], result[..., :h, h:] = below, below.mT
    return result


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    In float32 LAPACK's solver fails, or returns NaN, on some matrices of low rank, such as the statistics of a layer
    many of whose units are dead: these are solved in float64.

    Args:
        a: Shape ``[..., n, n]``.

    Raises:
        torch.linalg.LinAlgError: If entries are not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(a)
        if a.dtype == torch.float64 or vectors.isfinite().all():
            return values, vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if a.dtype == torch.float64:
            raise
    values, vectors = (x.to(a.dtype) for x in torch.linalg.eigh(a.double()))
    return values, vectors
