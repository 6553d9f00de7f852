"""Q families that are Kronecker products of learned factors, without a basis."""

from __future__ import annotations

import math

from torch import Tensor

from ._sides import Side
from ._trees import dense
from ._types import LowRank, Packed
from .qmodules import QModule, Roots, exp_root

__all__ = ["Kronecker", "ScaledKronecker"]


def gradient_grams(u: Packed, w: Packed, left: Side, right: Side) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\tilde u^\top \tilde w` and :math:`\tilde u \tilde w^\top`, each plus its transpose.

    Of a long side only the diagonal blocks are formed. Where both are factored, :math:`\tilde u = d^\top a`,
    :math:`\tilde w = d_w^\top a_w`, only rows x rows products are formed.

    Args:
        u: Whitened probe.
        w: Whitened gradient in v.
        left: The n-sided factor.
        right: The m-sided factor.
    """
    if isinstance(u, LowRank) and isinstance(w, LowRank):
        gram_l = left.gram(u.a, (u.d @ w.d.mT) @ w.a)
        gram_r = right.gram(u.d, (u.a @ w.a.mT) @ w.d)
    else:
        u, w = dense(u), dense(w)
        gram_l, gram_r = left.gram(u, w), right.gram(u.mT, w.mT)
    return gram_l + gram_l.mT, gram_r + gram_r.mT


class Kronecker(QModule):
    r"""Kronecker product without a basis: :math:`Q u = R^\top R \, U \, L L^\top`.

    Parameters: ``L`` ``[n, n]`` and ``R`` ``[m, m]``, both starting at the identity; block-diagonal,
    ``[blocks, size, size]``, for sides longer than ``max_dim``, and with a leading axis for groups.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        max_dim: A side longer than this becomes block-diagonal.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = Kronecker((2, 3))
        >>> q.scale_(4.0)
        >>> q(torch.ones(2, 3)).tolist()
        [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """

    L: Tensor
    R: Tensor

    def _setup(self) -> None:
        self.left, self.right = Side.of(self.n, self.max_dim), Side.of(self.m, self.max_dim)
        self._parameter("L", self._eye(self.left))
        self._parameter("R", self._eye(self.right))

    def roots(self) -> Roots:
        return self.L, self.R

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        L, R = roots
        if isinstance(u, LowRank):
            return LowRank(self.right.mul(u.d, R.mT), self.left.mul(u.a, L))
        return self.right.mul(self.left.mul(u, L).mT, R.mT).mT

    def color(self, roots: Roots, z: Packed) -> Packed:
        L, R = roots
        if isinstance(z, LowRank):
            return LowRank(self.right.mul(z.d, R), self.left.mul(z.a, L.mT))
        return self.right.mul(self.left.mul(z, L.mT).mT, R).mT

    def relative(self, roots: Roots, u: Packed, w: Packed, uz: Packed, wz: Packed) -> dict[str, Tensor]:
        gram_l, gram_r = gradient_grams(uz, wz, self.left, self.right)
        return {"L": gram_l, "R": gram_r}

    def flops(self) -> int:
        return 4 * math.prod(self.shape) * (self.left.size + self.right.size)

    def diagonal(self) -> Tensor:
        L, R = self.roots()[:2]
        diagonal_l = self.left.diagonal(L.square().sum(-1))
        diagonal_r = self.right.diagonal(R.square().sum(-2))
        return diagonal_r.unsqueeze(-1) * diagonal_l.unsqueeze(-2)


class ScaledKronecker(Kronecker):
    r"""Kronecker product between elementwise scales, the original's form.

    .. math:: Q u = A \odot (R^\top R (A \odot U) L L^\top)

    Parameters: ``L``, ``R`` as in :class:`Kronecker`, and ``s`` of the packed shape, :math:`A = e^s`, starting at zero.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        max_dim: A side longer than this becomes block-diagonal.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = ScaledKronecker((1, 2))
        >>> q.diagonal().tolist()
        [[1.0, 1.0]]
    """

    s: Tensor

    def _setup(self) -> None:
        super()._setup()
        self._parameter("s", self._ones(*self.shape).log())

    def roots(self) -> Roots:
        return self.L, self.R, exp_root(self.s)

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        return super().whiten(roots[:2], roots[2] * dense(u))

    def color(self, roots: Roots, z: Packed) -> Packed:
        return roots[2] * dense(super().color(roots[:2], z))

    def relative(self, roots: Roots, u: Packed, w: Packed, uz: Packed, wz: Packed) -> dict[str, Tensor]:
        v, qw = dense(self.color(roots, uz)), dense(self.color(roots, wz))
        return super().relative(roots[:2], u, w, uz, wz) | {"s": dense(w) * v + dense(u) * qw}

    def flops(self) -> int:
        return super().flops() + 2 * math.prod(self.shape)

    def diagonal(self) -> Tensor:
        return exp_root(self.s).square() * super().diagonal()
