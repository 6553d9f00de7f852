"""Conjugate gradients with a preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._types import Params


class Solution(NamedTuple):
    r"""What ``solve`` returns.

    Attributes:
        x: The solution, of the kind of b.
        iterations: Products with the matrix that the iteration took.
        residual: :math:`\|b - Ax\| / \|b\|`, computed from x at the end; zero for b = 0.
        converged: Whether that is at most ``tol``.
    """

    x: Tensor | Params
    iterations: int
    residual: float
    converged: bool


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tol: float,
    max_iterations: int,
) -> tuple[Tensor, int, float]:
    r"""Solve :math:`Ax = b` for a positive-definite A.

    The residual is carried along; where it says that x is good enough, the true one is taken, and the iteration is
    started again from x if that is not.

    Args:
        multiply: A.
        b: Right-hand side, ``[P]``.
        precondition: A positive-definite operator near the inverse of A.
        tol: On the relative residual.
        max_iterations: Most products with A.

    Returns:
        x, the number of iterations, and the true relative residual.

    References:
        Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving linear systems".
    """
    x, r, size = torch.zeros_like(b), b.clone(), torch.linalg.vector_norm(b)
    p, rz, k = torch.zeros_like(b), b.new_zeros(()), 0
    while size > 0 and k < max_iterations:
        z = precondition(r)
        previous, rz = rz, r @ z
        p = z + (rz / previous) * p if previous > 0 else z
        Ap = multiply(p)
        step = rz / (p @ Ap)
        x, r, k = x + step * p, r - step * Ap, k + 1
        if not torch.linalg.vector_norm(r) > tol * size:
            r = b - multiply(x)
            if not torch.linalg.vector_norm(r) > tol * size:
                break
            rz = torch.zeros_like(rz)  # rounding has led r astray: start again
    residual = torch.linalg.vector_norm(b - multiply(x)) / size if size > 0 else size
    return x, k, float(residual)
