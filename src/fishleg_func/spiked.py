"""Q that is a multiple of the identity but for a few directions, for all parameters of a large model together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._trees import dense
from ._types import Packed
from .qmodules import Gradients, QModule, Roots, exp_root


class Spiked(QModule):
    r"""A multiple of the identity with a correction of low rank.

    .. math:: Q = V \mathrm{diag}(d_1^2, \dots, d_r^2) V^\top + d_{r+1}^2 (I - V V^\top), \qquad d = c\,e^s

    Parameter: ``s`` ``[r + 1]``, starting at zero. Basis: ``V`` ``[P, r]`` with orthonormal columns, P = m n being the
    number of entries, and ``c`` ``[r + 1]``; the first unit vectors and ones, until :meth:`place_` says otherwise. A
    leading axis for groups.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        rank: r, at most P.
        max_dim: Not used: nothing here grows faster than r times the shape.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = Spiked((1, 3), rank=1)
        >>> q.place_(torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([0.25, 2.0]))
        >>> q.diagonal()
        tensor([[2.0000, 0.2500, 2.0000]])
    """

    s: Tensor
    c: Tensor
    V: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        rank: int,
        max_dim: int = 4096,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.rank = rank
        super().__init__(shape, max_dim=max_dim, dtype=dtype, device=device)

    def _setup(self) -> None:
        size = self.m * self.n
        first = torch.eye(size, self.rank, dtype=self._dtype, device=self._device)
        self._parameter("s", self._ones(*self.groups, self.rank + 1).log())
        self.register_buffer("c", self._ones(*self.groups, self.rank + 1))
        self.register_buffer("V", first.expand(*self.groups, size, self.rank).clone())

    @torch.no_grad()
    def place_(self, vectors: Tensor, values: Tensor) -> None:
        """Set eigenvectors and eigenvalues of Q.

        Args:
            vectors: Orthonormal columns, ``[*groups, P, r]``.
            values: Their eigenvalues and, last, that of all directions across them, ``[*groups, r + 1]``.
        """
        self.s.zero_()
        self.V.copy_(vectors)
        self.c.copy_(values.sqrt())

    def roots(self) -> Roots:
        return self.V, self.c * exp_root(self.s)

    def _mul(self, u: Packed, V: Tensor, values: Tensor) -> Tensor:
        """Multiply by the symmetric matrix with these eigenvalues."""
        x = dense(u)
        flat, values = x.flatten(-2).unsqueeze(-2), values.unsqueeze(-2)  # "... m n -> ... 1 (m n)"
        top, rest = values[..., :-1], values[..., -1:]
        return (rest * flat + ((flat @ V) * (top - rest)) @ V.mT).view(x.shape)

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        return self._mul(u, *roots)

    def color(self, roots: Roots, z: Packed) -> Packed:
        return self._mul(z, *roots)  # B is symmetric

    def operator(self) -> Roots:
        return self.V, self.roots()[1].square()

    def act(self, operator: Roots, u: Packed) -> Packed:
        return self._mul(u, *operator)

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        V, values = operator
        x, y = (dense(t).flatten(-2).unsqueeze(-2) for t in (u, w))
        top = ((x @ V) * (y @ V)).squeeze(-2)
        rest = (x * y).sum(-1) - top.sum(-1, keepdim=True)
        return {"s": 2 * values * torch.cat([top, rest], -1)}

    def flops(self) -> int:
        return 4 * math.prod(self.shape) * self.rank

    def diagonal(self) -> Tensor:
        V, values = self.operator()
        weights = V.square()
        across = (1 - weights.sum(-1)).clamp(min=0)  # of the squared unit vector; rounding may leave it below zero
        return ((weights @ values[..., :-1, None]).squeeze(-1) + across * values[..., -1:]).view(self.shape)

    def logdet(self) -> Tensor:
        logs = 2 * self.roots()[1].log()
        return logs[..., :-1].sum() + (self.m * self.n - self.rank) * logs[..., -1].sum()
