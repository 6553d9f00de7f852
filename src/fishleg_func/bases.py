"""Q families in a basis taken from running statistics of the Fisher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._linalg import inverse_lower
from ._opaque import opaque
from ._sides import Chain, Side
from ._trees import assign_, dense
from ._types import LowRank, Packed
from .kronecker import Kronecker
from .qmodules import Carry, Gradients, QModule, Roots, exp_root

__all__ = ["KFAC", "Diagonal", "Eigen", "Embedding"]


def kronecker_statistics(z: Packed, left: Side, right: Side) -> dict[str, Packed]:
    r"""Return ``cov_L`` and ``cov_R`` with :math:`F \approx cov_R \otimes cov_L`, from one random gradient z.

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
        return {"cov_L": LowRank(left.split(z.a * (counts / total)), a), "cov_R": LowRank(d, d)}
    norm = torch.linalg.matrix_norm(z, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    cov_l, cov_r = left.gram(z, z), right.gram(z.mT, z.mT)
    return {"cov_L": cov_l / _like_blocks(norm, cov_l), "cov_R": cov_r / _like_blocks(norm, cov_r)}


def _like_blocks(x: Tensor, blocks: Tensor) -> Tensor:
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
    rho = rho.reshape(rho.shape + (1,) * (cov.ndim - rho.ndim))
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    lower, info = torch.linalg.cholesky_ex(cov + rho * eye)
    root = inverse_lower(lower).mT
    good = (info == 0)[..., None, None] & root.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(good, root, previous).contiguous()


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
        self._statistic("second", self.shape)

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

    def gather_(self, z: Packed, ok: Tensor | None = None) -> None:
        self._average_({"second": dense(z).square()}, ok)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        assign_(self.c, (self.second + damping).rsqrt(), ok)


class KFAC(Kronecker):
    r"""Kronecker product in a whitening basis, the default.

    .. math:: Q u = K_R U K_L, \qquad K_L = C_L L L^\top C_L^\top, \qquad K_R = C_R R^\top R C_R^\top

    Parameters: ``L``, ``R`` as in :class:`~fishleg_func.families.Kronecker`. Basis: ``C_L``, ``C_R``, inverse Cholesky
    factors of the damped statistics ``cov_L`` :math:`= E[aa^\top]` and ``cov_R`` :math:`= E[\delta\delta^\top]`;
    the identity before the first refresh. With λ at the identity this is K-FAC; the auxiliary loss learns
    what K-FAC gets wrong.

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
    C_L: Tensor
    C_R: Tensor
    cov_L: Tensor
    cov_R: Tensor

    def _setup(self) -> None:
        super()._setup()
        self.register_buffer("C_L", self.L.detach().clone())
        self.register_buffer("C_R", self.R.detach().clone())
        self._statistic("cov_L", tuple(self.L.shape))
        self._statistic("cov_R", tuple(self.R.shape))

    def chains(self) -> tuple[Chain, Chain]:
        return (self.C_L, self.L), (self.C_R, self.R.mT)

    def gather_(self, z: Packed, ok: Tensor | None = None) -> None:
        self._average_(kronecker_statistics(z, self.left, self.right), ok)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        rho_l, rho_r = factored_damping(self.cov_L, self.cov_R, self.m, self.n, len(self.groups), damping)
        assign_(self.C_L, whitening_root(self.cov_L, rho_l, self.C_L), ok)
        assign_(self.C_R, whitening_root(self.cov_R, rho_r, self.C_R), ok)


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
        self._statistic("cov_L", tuple(self.C_L.shape))
        self._statistic("cov_R", tuple(self.C_R.shape))

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

    def gather_(self, z: Packed, ok: Tensor | None = None) -> None:
        self._average_(kronecker_statistics(z, self.left, self.right), ok)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        mu_l, vectors_l = torch.linalg.eigh(self.cov_L)
        mu_r, vectors_r = torch.linalg.eigh(self.cov_R)
        assign_(self.C_L, vectors_l, ok)
        assign_(self.C_R, vectors_r, ok)
        mu = self.right.diagonal(mu_r).unsqueeze(-1) * self.left.diagonal(mu_l).unsqueeze(-2)
        assign_(self.c, (mu.clamp(min=0) + damping).rsqrt(), ok)


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
        self._statistic("second", (*self.groups, self.m))
        self._statistic("cov_L", tuple(self.L.shape))

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

    def gather_(self, z: Packed, ok: Tensor | None = None) -> None:
        z = dense(z)
        norm = torch.linalg.matrix_norm(z).clamp(min=torch.finfo(z.dtype).tiny)
        gram = self.left.gram(z, z)
        scaled = gram / _like_blocks(norm[..., None, None], gram)
        self._average_({"second": z.square().sum(-1) / norm.unsqueeze(-1), "cov_L": scaled}, ok)

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        rows = torch.diag_embed(self.second.unsqueeze(-1))  # [*groups, m, 1, 1]: blocks of size one
        rho_l, rho_r = factored_damping(self.cov_L, rows, self.m, self.n, len(self.groups), damping)
        assign_(self.C_L, whitening_root(self.cov_L, rho_l, self.C_L), ok)
        assign_(self.c, (self.second + rho_r.unsqueeze(-1)).rsqrt(), ok)
