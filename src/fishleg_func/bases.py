"""Q families in a basis taken from running statistics of the Fisher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._sides import Chain, Side
from ._trees import assign_, dense
from ._triangles import average_symmetric_, pair_of, symmetric_of, upper_of, write_upper_
from ._types import Packed
from .covariances import eigenbasis, factored_damping, kronecker_statistics, like_blocks, whitening_root
from .kronecker import Kronecker
from .qmodules import Carry, Gradients, QModule, Roots, exp_root
from .schedule import RATE

__all__ = ["KFAC", "Diagonal", "Eigen", "Embedding"]


class Diagonal(QModule):
    r"""Elementwise operator, for vectors and scalars that no layer type claims: :math:`Q = \mathrm{diag}((c\,e^s)^2)`.

    Parameter: ``s`` of the packed shape, starting at zero. Basis: ``c`` :math:`= (\mathrm{diag} F + \gamma)^{-1/2}`
    from squared random gradients, one before the first refresh.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        max_dim: Not used: nothing here grows faster than the shape.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = Diagonal((1, 2))
        >>> q.gather_(torch.tensor([[1.0, 2.0]]))
        >>> q.refresh_(torch.tensor(1.0))
        >>> [round(x, 6) for x in q.diagonal().flatten().tolist()]  # 1 / (1 + 1), 1 / (4 + 1)
        [0.5, 0.2]
    """

    s: Tensor
    c: Tensor
    second: Tensor

    def _setup(self) -> None:
        self._parameter("s", self._ones(*self.shape).log())
        self.register_buffer("c", self._ones(*self.shape))
        self._statistic("second", self._zeros(*self.shape))

    def roots(self) -> Roots:
        return (self.c * exp_root(self.s),)

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        return roots[0] * dense(u)

    def color(self, roots: Roots, z: Packed) -> Packed:
        return roots[0] * dense(z)

    def operator(self) -> Roots:
        return (self.roots()[0].square(),)

    def act(self, operator: Roots, u: Packed) -> Packed:
        return operator[0] * dense(u)

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        return {"s": 2 * dense(v) * dense(w)}

    def flops(self) -> int:
        return math.prod(self.shape)

    def diagonal(self) -> Tensor:
        return self.roots()[0].square()

    def logdet(self) -> Tensor:
        return 2 * self.roots()[0].log().sum()

    def gather_(self, z: Packed, ok: Tensor | None = None, rate: float = RATE) -> None:
        self._average_({"second": dense(z).square()}, ok, rate)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        assign_(self.c, (self.second + damping).rsqrt(), ok)


class KFAC(Kronecker):
    r"""Kronecker product in a whitening basis, the default.

    .. math:: Q u = K_R U K_L, \qquad K_L = C_L L L^\top C_L^\top, \qquad K_R = C_R R^\top R C_R^\top

    Parameters: ``L``, ``R`` as in :class:`~fishleg_func.families.Kronecker`. Basis: ``C_L``, ``C_R``, inverse Cholesky
    factors of the damped statistics ``cov_L`` :math:`= E[aa^\top]` and ``cov_R`` :math:`= E[\delta\delta^\top]`;
    the identity before the first refresh. With λ at the identity this is K-FAC; the auxiliary loss learns
    what K-FAC gets wrong. Each C and cov share a buffer, ``pair_L`` and ``pair_R``, since one is triangular and the
    other symmetric.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        max_dim: A side longer than this becomes block-diagonal.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = KFAC((1, 1), dtype=torch.float64)
        >>> q.gather_(torch.tensor([[3.0]], dtype=torch.float64))
        >>> q.refresh_(torch.tensor(1.0, dtype=torch.float64))  # cov_L = cov_R = 3, pi = 1: 1 / (3 + 1)^2
        >>> q.diagonal().item()
        0.0625
    """

    takes_rows = True
    scale_free = True
    inverts = True
    pair_L: Tensor
    pair_R: Tensor

    def _setup(self) -> None:
        super()._setup()
        self._statistic("pair_L", pair_of(self.L.detach()))
        self._statistic("pair_R", pair_of(self.R.detach()))

    @property
    def C_L(self) -> Tensor:
        """The upper triangular basis of the n side, in the shape of L; a copy, as are the next three."""
        return upper_of(self.pair_L)

    @property
    def C_R(self) -> Tensor:
        """The upper triangular basis of the m side, in the shape of R."""
        return upper_of(self.pair_R)

    @property
    def cov_L(self) -> Tensor:
        """The running mean that C_L comes from."""
        return symmetric_of(self.pair_L)

    @property
    def cov_R(self) -> Tensor:
        """The running mean that C_R comes from."""
        return symmetric_of(self.pair_R)

    def chains(self) -> tuple[Chain, Chain]:
        return (self.C_L, self.L), (self.C_R, self.R.mT)

    def unact(self, operator: Roots, v: Tensor) -> Tensor:  # zero where Q is singular to rounding
        K_L, K_R = operator
        return self.right.solve(self.left.solve(v, K_L).mT, K_R).mT

    def gather_(self, z: Packed, ok: Tensor | None = None, rate: float = RATE) -> None:
        cov_l, cov_r = kronecker_statistics(z, self.left, self.right)
        self._average_({"pair_L": cov_l, "pair_R": cov_r}, ok, rate, average_symmetric_)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        cov_l, cov_r = self.cov_L, self.cov_R
        rho_l, rho_r = factored_damping(cov_l, cov_r, self.m, self.n, len(self.groups), damping)
        write_upper_(self.pair_L, whitening_root(cov_l, rho_l, self.C_L), ok)
        write_upper_(self.pair_R, whitening_root(cov_r, rho_r, self.C_R), ok)


class Eigen(QModule):
    r"""Diagonal in the Kronecker eigenbasis.

    .. math:: Q = (C_R \otimes C_L)\,\mathrm{diag}((c\,e^s)^2)\,(C_R \otimes C_L)^\top

    Parameter: ``s`` of the packed shape, starting at zero. Basis: orthogonal ``C_L``, ``C_R``, and ``c`` from the
    eigenvalues, :math:`c = (\mu_R \mu_L^\top + \gamma)^{-1/2}`. A side longer than ``max_dim`` keeps its
    own coordinates.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        max_dim: A side longer than this is not rotated.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = Eigen((1, 1), dtype=torch.float64)
        >>> q.gather_(torch.tensor([[3.0]], dtype=torch.float64))
        >>> q.refresh_(torch.tensor(1.0, dtype=torch.float64))  # 1 / (3 * 3 + 1)
        >>> round(q.diagonal().item(), 12)
        0.1
    """

    two_sided = True
    takes_rows = True
    s: Tensor
    c: Tensor
    C_L: Tensor
    C_R: Tensor
    cov_L: Tensor
    cov_R: Tensor

    def _setup(self) -> None:
        # a side that is not rotated is one of blocks of size one
        self.left = Side.of(self.n, self.max_dim) if self.n <= self.max_dim else Side(self.n, self.n, 1)
        self.right = Side.of(self.m, self.max_dim) if self.m <= self.max_dim else Side(self.m, self.m, 1)
        self._parameter("s", self._ones(*self.shape).log())
        self.register_buffer("c", self._ones(*self.shape))
        self.register_buffer("C_L", self._eye(self.left))
        self.register_buffer("C_R", self._eye(self.right))
        self._statistic("cov_L", torch.zeros_like(self.C_L))
        self._statistic("cov_R", torch.zeros_like(self.C_R))

    def roots(self) -> Roots:
        return self.C_L, self.C_R, self.c * exp_root(self.s)

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        C_L, C_R, root = roots
        return root * self.right.mul(self.left.mul(dense(u), C_L).mT, C_R).mT

    def color(self, roots: Roots, z: Packed) -> Packed:
        C_L, C_R, root = roots
        return self.right.mul(self.left.mul(root * dense(z), C_L.mT).mT, C_R.mT).mT

    def operator(self) -> Roots:
        return self.C_L, self.C_R, self.roots()[2].square()

    def act(self, operator: Roots, u: Packed) -> Packed:
        C_L, C_R, square = operator
        rotated = square * self.right.mul_first(C_R.mT, self.left.mul(dense(u), C_L))
        return self.right.mul_first(C_R, self.left.mul(rotated, C_L.mT))

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        roots = self.roots()
        return {"s": 2 * dense(self.whiten(roots, u)) * dense(self.whiten(roots, w))}

    def flops(self) -> int:
        return 4 * math.prod(self.shape) * (self.left.size + self.right.size)

    def diagonal(self) -> Tensor:
        C_L, C_R, root = self.roots()
        rotated = self.left.mul(root.square(), C_L.square().mT)
        return self.right.mul(rotated.mT, C_R.square().mT).mT

    def logdet(self) -> Tensor:
        return 2 * self.roots()[2].log().sum()  # the basis is orthogonal

    def gather_(self, z: Packed, ok: Tensor | None = None, rate: float = RATE) -> None:
        cov_l, cov_r = kronecker_statistics(z, self.left, self.right)
        self._average_({"cov_L": cov_l, "cov_R": cov_r}, ok, rate)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        C_L, C_R = eigenbasis(self.cov_L, self.C_L), eigenbasis(self.cov_R, self.C_R)
        mu_l, mu_r = ((C * (cov @ C)).sum(-2) for C, cov in ((C_L, self.cov_L), (C_R, self.cov_R)))
        mu = self.right.diagonal(mu_r).unsqueeze(-1) * self.left.diagonal(mu_l).unsqueeze(-2)
        c = torch.where(mu.isfinite(), (mu.clamp(min=0) + damping).rsqrt(), self.c)
        for kept, new in ((self.C_L, C_L), (self.C_R, C_R), (self.c, c)):
            assign_(kept, new, ok)


class Embedding(QModule):
    r"""Diagonal over rows, dense over columns, for tables.

    .. math:: Q = \mathrm{diag}((c\,e^s)^2) \otimes C_L L L^\top C_L^\top

    Parameters: ``s`` ``[m]``, starting at zero, and ``L`` ``[n, n]``, starting at the identity. Basis: ``c`` ``[m]``
    and ``C_L`` ``[n, n]`` from the running means ``second`` (of each row's squared entries) and ``cov_L``; nothing
    grows as m².

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``: m rows of a table, each of n entries.
        max_dim: A column side longer than this becomes block-diagonal.
        dtype: Of λ.
        device: Of λ.

    Example:
        >>> import torch
        >>> q = Embedding((50_000, 2))
        >>> sum(p.numel() for p in q.parameters())
        50004
    """

    s: Tensor
    L: Tensor
    c: Tensor
    C_L: Tensor
    second: Tensor
    cov_L: Tensor

    def _setup(self) -> None:
        self.left = Side.of(self.n, self.max_dim)
        self._parameter("L", self._eye(self.left))
        self._parameter("s", self._ones(*self.groups, self.m).log())
        self.register_buffer("c", self._ones(*self.groups, self.m))
        self.register_buffer("C_L", self.L.detach().clone())
        self._statistic("second", self._zeros(*self.groups, self.m))
        self._statistic("cov_L", torch.zeros_like(self.C_L))

    def roots(self) -> Roots:
        return self.C_L, self.L, (self.c * exp_root(self.s)).unsqueeze(-1)

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        return roots[2] * self.left.whiten(dense(u), roots[:2])

    def color(self, roots: Roots, z: Packed) -> Packed:
        return roots[2] * self.left.color(dense(z), roots[:2])

    def operator(self) -> Roots:
        *chain, rows = self.roots()
        return self.left.operator(chain), rows.square()

    def act(self, operator: Roots, u: Packed) -> Packed:
        return operator[1] * self.left.mul(dense(u), operator[0])

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        u, v, w = dense(u), dense(v), dense(w)
        gradient = self.left.gradient(u, operator[1] * w, (self.C_L, self.L))
        return {"L": gradient, "s": 2 * (v * w).sum(-1)}

    def retract_(self, operator: Roots, gradients: Gradients, rate: Tensor, ok: Tensor | None = None) -> Carry | None:
        self.left.retract_(operator[0], (self.C_L, self.L), gradients["L"], rate, ok)
        self.shift_(dense(gradients["s"]), rate, ok)
        assign_(operator[1], self.roots()[2].square(), ok)
        return None

    def flops(self) -> int:
        return 2 * math.prod(self.shape) * self.left.size

    def diagonal(self) -> Tensor:
        K_L, rows = self.operator()
        return rows * self.left.diagonal(K_L.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)

    def logdet(self) -> Tensor:
        *chain, rows = self.roots()
        return self.m * self.left.logdet(chain) + 2 * self.n * rows.log().sum()

    def gather_(self, z: Packed, ok: Tensor | None = None, rate: float = RATE) -> None:
        z = dense(z)
        norm = torch.linalg.matrix_norm(z).clamp(min=torch.finfo(z.dtype).tiny)
        gram = self.left.gram(z, z)
        scaled = gram / like_blocks(norm[..., None, None], gram)
        self._average_({"second": z.square().sum(-1) / norm.unsqueeze(-1), "cov_L": scaled}, ok, rate)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        rows = torch.diag_embed(self.second.unsqueeze(-1))  # [*groups, m, 1, 1]: blocks of size one
        rho_l, rho_r = factored_damping(self.cov_L, rows, self.m, self.n, len(self.groups), damping)
        assign_(self.C_L, whitening_root(self.cov_L, rho_l, self.C_L), ok)
        assign_(self.c, (self.second + rho_r.unsqueeze(-1)).rsqrt(), ok)
