"""Q families that are Kronecker products of learned factors, without a basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._sides import Chain, Side
from ._trees import assign_, dense, rows_times, transposed
from ._types import LowRank, Packed
from .qmodules import Carry, Gradients, QModule, Roots, exp_root

__all__ = ["Kronecker", "ScaledKronecker"]


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

    two_sided = True
    keeps_factors = True
    L: Tensor
    R: Tensor

    def _setup(self) -> None:
        self.left, self.right = Side.of(self.n, self.max_dim), Side.of(self.m, self.max_dim)
        self._parameter("L", self._eye(self.left))
        self._parameter("R", self._eye(self.right))

    def chains(self) -> tuple[Chain, Chain]:
        """Return what the roots of K_L and of K_R are products of."""
        return (self.L,), (self.R.mT,)

    def roots(self) -> Roots:
        left, right = self.chains()
        return (*left, *right)

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        left, right = _halves(roots)
        if isinstance(u, LowRank):
            return LowRank(self.right.whiten(u.d, right), self.left.whiten(u.a, left))
        return self.right.whiten(self.left.whiten(u, left).mT, right).mT

    def color(self, roots: Roots, z: Packed) -> Packed:
        left, right = _halves(roots)
        if isinstance(z, LowRank):
            return LowRank(self.right.color(z.d, right), self.left.color(z.a, left))
        return self.right.color(self.left.color(z, left).mT, right).mT

    def operator(self) -> Roots:
        left, right = self.chains()
        return self.left.operator(left), self.right.operator(right)

    def act(self, operator: Roots, u: Packed) -> Packed:
        K_L, K_R = operator
        if isinstance(u, LowRank):
            return LowRank(self.right.mul(u.d, K_R), self.left.mul(u.a, K_L))
        return self.right.mul_first(K_R, self.left.mul(u, K_L))

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        left, right = self.chains()
        if isinstance(u, LowRank) and isinstance(v, LowRank):
            x_l, y_l = u.a, rows_times(v.d, w)
            x_r, y_r = u.d, rows_times(v.a, transposed(w))
        else:
            K_L, K_R = operator
            u, w = dense(u), dense(w)
            x_l, y_l = u, self.right.mul_first(K_R, w)
            x_r, y_r = u.mT, self.left.mul(w, K_L).mT
        return {"L": self.left.gradient(x_l, y_l, left), "R": self.right.gradient(x_r, y_r, right)}

    def retract_(self, operator: Roots, gradients: Gradients, rate: Tensor, ok: Tensor | None = None) -> Carry | None:
        left, right = self.chains()
        shift_l = self.left.retract_(operator[0], left, gradients["L"], rate, ok)
        shift_r = self.right.retract_(operator[1], right, gradients["R"], rate, ok)
        if shift_l is None or shift_r is None:
            return None

        def carry(p: Tensor) -> Tensor:
            moved = self.right.shifted_first(self.left.shifted(p, shift_l), shift_r)
            return moved if ok is None else torch.where(ok, moved, p)

        return carry

    def flops(self) -> int:
        return 2 * math.prod(self.shape) * (self.left.size + self.right.size)

    def diagonal(self) -> Tensor:
        K_L, K_R = self.operator()[:2]
        diagonal_l = self.left.diagonal(K_L.diagonal(dim1=-2, dim2=-1))
        diagonal_r = self.right.diagonal(K_R.diagonal(dim1=-2, dim2=-1))
        return diagonal_r.unsqueeze(-1) * diagonal_l.unsqueeze(-2)

    def logdet(self) -> Tensor:
        left, right = self.chains()
        return self.m * self.left.logdet(left) + self.n * self.right.logdet(right)


def _halves(roots: Roots) -> tuple[Chain, Chain]:
    half = len(roots) // 2
    return roots[:half], roots[half:]


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

    keeps_factors = False
    s: Tensor

    def _setup(self) -> None:
        super()._setup()
        self._parameter("s", self._ones(*self.shape).log())

    def roots(self) -> Roots:
        return (*super().roots(), exp_root(self.s))

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        return super().whiten(roots[:-1], roots[-1] * dense(u))

    def color(self, roots: Roots, z: Packed) -> Packed:
        return roots[-1] * dense(super().color(roots[:-1], z))

    def operator(self) -> Roots:
        return (*super().operator(), exp_root(self.s))

    def act(self, operator: Roots, u: Packed) -> Packed:
        *sides, scale = operator
        return scale * dense(super().act(tuple(sides), scale * dense(u)))

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        *sides, scale = operator
        u, v, w = dense(u), dense(v), dense(w)
        slope = w * v + u * dense(self.act(operator, w))
        return super().relative(tuple(sides), scale * u, v, scale * w) | {"s": slope}

    def retract_(self, operator: Roots, gradients: Gradients, rate: Tensor, ok: Tensor | None = None) -> Carry | None:
        super().retract_(operator[:-1], gradients, rate, ok)
        self.shift_(dense(gradients["s"]), rate, ok)
        assign_(operator[-1], exp_root(self.s), ok)
        return None

    def flops(self) -> int:
        return super().flops() + 2 * math.prod(self.shape)

    def diagonal(self) -> Tensor:
        return exp_root(self.s).square() * super().diagonal()

    def logdet(self) -> Tensor:
        return super().logdet() + 2 * exp_root(self.s).log().sum()
