r"""The Q algebra: positive-definite operators on packed matrices, with no knowledge of networks.

Every family is written as :math:`Q = B B^\top`. What a family supplies is B (``color``) and its transpose (``whiten``);
in the whitened coordinates :math:`\tilde u = B^\top u`, :math:`\tilde w = B^\top w` the gradients of the auxiliary loss
are short (docs/maths.md). ``roots`` are the tensors that B is made of. Training applies Q through ``operator``,
products of the roots that are kept until λ changes and passed back in: half the work of B and its transpose.

A family has parameters λ (``L``, ``R``, ``s``) and may have a basis (``C_L``, ``C_R``, ``c``) that
:meth:`QModule.refresh_` takes from running statistics of the Fisher, so that λ at the identity is already K-FAC or its
diagonal counterpart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import _checks
from ._sides import Side
from ._trees import assign_, average_, dense
from ._types import Packed, Symmetrized
from .schedule import RATE, weight_of

__all__ = ["Dense", "QModule"]

Roots = tuple[Tensor, ...]
Gradients = dict[str, Tensor | Symmetrized]
Carry = Callable[[Tensor], Tensor]
Average = Callable[[Tensor, Packed, Tensor, Tensor | None], None]

_S_LIMIT = 30.0  # |s| at which a log-root saturates: e^{±60} in Q is still far inside of float32


class QModule(nn.Module, ABC):
    r"""A symmetric positive-definite operator :math:`Q(\lambda) = BB^\top` on packed matrices of one shape.

    Evaluate it at any λ with ``torch.func.functional_call(q, lam, (u,))``. Subclasses define :meth:`roots`,
    :meth:`whiten`, :meth:`color`, :meth:`operator`, :meth:`act`, :meth:`relative` and :meth:`diagonal`, and those
    with a basis :meth:`gather_` and :meth:`refresh_`.

    Args:
        shape: Shape of the packed matrix, ``(m, n)``, or ``(groups, m, n)``, each group having its own Q.
        max_dim: A side longer than this becomes block-diagonal.
        dtype: Of λ.
        device: Of λ.

    Raises:
        ValueError: If the shape has an empty axis or is not two- or three-dimensional.
    """

    two_sided = False  # whether rows and columns are spaces of their own, on each of which Q acts
    takes_rows = False  # whether gather_ is better served with factors over rows than with a dense gradient
    scale_free = False  # whether λ may learn the shape of Q alone: its basis gives the scale
    inverts = False  # whether unact costs no more than some products with Q, so that m need not be kept
    keeps_factors = False  # whether Q of a factored matrix is factored, and moves of λ cost less for it
    shape: tuple[int, ...]
    count: Tensor
    s: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        max_dim: int = 4096,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(
                f"shape={tuple(shape)} must be (m, n) or (groups, m, n), all >= 1; pack the parameters first"
            )
        self.shape = tuple(shape)
        *groups, self.m, self.n = shape
        self.groups = tuple(groups)
        self.max_dim = max_dim
        self._dtype, self._device = dtype, device
        self._setup()

    @abstractmethod
    def _setup(self) -> None:
        """Make λ and the basis, from what the constructor was given."""

    def _parameter(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _eye(self, side: Side) -> Tensor:
        return side.eye(self.groups, self._dtype, self._device)

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self._dtype, device=self._device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    @abstractmethod
    def roots(self) -> Roots:
        """Return the tensors that B is made of: the present λ and basis, or elementwise functions of them."""

    @abstractmethod
    def whiten(self, roots: Roots, u: Packed) -> Packed:
        r"""Return :math:`B^\top u`.

        Args:
            roots: From :meth:`roots`.
            u: Packed matrix, dense (leading batch dimensions allowed) or factored.

        Returns:
            The same kind where the family allows it, else dense.
        """

    @abstractmethod
    def color(self, roots: Roots, z: Packed) -> Packed:
        r"""Return :math:`B z`; for standard normal z this is a sample of N(0, Q).

        Args:
            roots: From :meth:`roots`.
            z: Whitened packed matrix, dense or factored.

        Returns:
            The same kind where the family allows it, else dense.
        """

    @abstractmethod
    def operator(self) -> Roots:
        """Return what Q is applied with, from the present λ and basis: new tensors, or those of the basis."""

    @abstractmethod
    def act(self, operator: Roots, u: Packed) -> Packed:
        """Return Q u.

        Args:
            operator: From :meth:`operator`.
            u: Packed matrix, dense (leading batch dimensions allowed) or factored.

        Returns:
            The same kind where the family allows it, else dense.
        """

    def unact(self, operator: Roots, v: Tensor) -> Tensor:
        """Return Q⁻¹ v: by default from the matrix, for small shapes.

        Args:
            operator: From :meth:`operator`.
            v: Packed matrix, dense.

        Returns:
            A tensor of the packed shape, up to rounding.
        """
        matrix = self._matrix(lambda u: self.act(operator, u))
        solution: Tensor = torch.linalg.solve(matrix, v.reshape(-1))
        return solution.view(v.shape)

    @abstractmethod
    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        r"""Return the relative gradient of :math:`\langle w, Q(\lambda)u \rangle` for each parameter of λ.

        Args:
            operator: From :meth:`operator`.
            u: Probe.
            v: Q u.
            w: Gradient of A in v, held constant.

        Returns:
            :math:`L^\top \partial_L`, :math:`\partial_R R^\top` and :math:`\partial_s`, by name of the parameter;
            those of matrices factored where that is cheaper.
        """

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal of Q in the packed shape."""

    def forward(self, u: Packed) -> Packed:
        """Return Q u.

        Args:
            u: Packed matrix, dense (leading batch dimensions allowed) or factored.

        Returns:
            Q u, factored where u is and the family allows it.
        """
        roots = self.roots()
        return self.color(roots, self.whiten(roots, u))

    def sqrt(self, z: Tensor) -> Tensor:
        r"""Return :math:`Bz` with :math:`BB^\top = Q`, for sampling from N(0, Q).

        Args:
            z: Standard normal, of the packed shape.

        Returns:
            A tensor of the packed shape.
        """
        return dense(self.color(self.roots(), z))

    def dense(self) -> Tensor:
        """Return Q as a matrix on the row-major flattening of the packed shape, for small shapes."""
        return self._matrix(self.forward)

    def _matrix(self, apply: Callable[[Tensor], Packed]) -> Tensor:
        """Return the matrix of a linear map of packed matrices."""
        size = math.prod(self.shape)
        like = next(self.parameters())
        basis = torch.eye(size, dtype=like.dtype, device=like.device).view(size, *self.shape)
        return dense(apply(basis)).reshape(size, size).mT

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant of Q, a 0-d tensor: by default from the matrix, for small shapes."""
        logdet: Tensor = torch.linalg.slogdet(self.dense()).logabsdet
        return logdet

    def retract_(self, operator: Roots, gradients: Gradients, rate: Tensor, ok: Tensor | None = None) -> Carry | None:
        r"""Step λ along relative gradients: :math:`L \leftarrow L(I - \eta G_L / \max(1, \|G_L\|_F))`, R and s alike.

        Args:
            operator: From :meth:`operator`; brought up to date in place.
            gradients: From :meth:`relative`.
            rate: η, 0-d.
            ok: Where given and false, nothing is changed.

        Returns:
            The map from Q m before to Q m after, for any dense m, where it is cheaper than applying Q.
        """
        for name, gradient in gradients.items():
            lam, gradient = getattr(self, name), dense(gradient)
            if name == "s":
                self.shift_(gradient, rate, ok)
            else:
                norm = torch.linalg.matrix_norm(gradient, keepdim=True)
                move = gradient * (rate / norm.clamp(min=1))
                assign_(lam, lam - (lam @ move if name == "L" else move @ lam), ok)
        self.renew_(operator, ok)
        return None

    def shift_(self, gradient: Tensor, rate: Tensor, ok: Tensor | None) -> None:
        """Step the log-scale s along its gradient, each entry by ``rate`` at most.

        Args:
            gradient: Of the shape of s.
            rate: η, 0-d.
            ok: Where given and false, nothing is changed.
        """
        assign_(self.s, self.s - rate * (self.s.numel() * gradient).clamp(-1, 1), ok)

    def renew_(self, operator: Roots, ok: Tensor | None = None) -> None:
        """Bring ``operator`` up to date with λ and the basis, in place.

        Args:
            operator: From :meth:`operator`.
            ok: Where given and false, nothing is changed.
        """
        for kept, new in zip(operator, self.operator(), strict=True):
            assign_(kept, new, ok)

    def scale_(self, factor: float | Tensor) -> None:
        """Multiply Q by a positive factor, through λ.

        Args:
            factor: A number or 0-d tensor.

        Raises:
            ValueError: If the factor is not positive and finite.
        """
        _checks.positive("factor", factor)
        lam = dict(self.named_parameters())
        factor = torch.as_tensor(factor, dtype=lam["s" if "s" in lam else "L"].dtype)
        with torch.no_grad():
            if "s" in lam:
                lam["s"].add_(0.5 * factor.log())
            else:
                lam["L"].mul_(factor.sqrt())

    def gather_(self, z: Packed, ok: Tensor | None = None, rate: float = RATE) -> None:
        r"""Add a random gradient to the running statistics of the Fisher; families without a basis have none.

        Args:
            z: A draw with :math:`E[zz^\top] = F`, factored or dense.
            ok: Where given and false, nothing is changed.
            rate: Least weight of the draw in the running mean.
        """

    def refresh_(self, damping: Tensor, ok: Tensor | None = None) -> None:
        """Recompute the basis from the statistics; λ stays.

        Args:
            damping: γ, 0-d.
            ok: Where given and false, nothing is changed.
        """

    @abstractmethod
    def flops(self) -> int:
        """Return the floating-point operations of applying Q to one dense packed matrix."""

    @property
    def has_basis(self) -> bool:
        """Whether the family has a basis to refresh."""
        return "count" in self._buffers

    def _statistic(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)
        if not self.has_basis:
            # an integer: torch 2.13 compiles lose writes to 0-d float64 tensors
            self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=self._device))

    def _average_(
        self, new: Mapping[str, Packed], ok: Tensor | None, rate: float, average_: Average = average_
    ) -> None:
        """Move the running means towards ``new``: a plain mean at first, exponential later."""
        assign_(self.count, self.count + 1, ok)
        for name, value in new.items():
            mean = getattr(self, name)
            average_(mean, value, weight_of(self.count.to(mean.dtype), rate), ok)

    def extra_repr(self) -> str:
        """Return the packed shape for ``print``."""
        return f"shape={self.shape}"


class Dense(QModule):
    r"""One full matrix over all entries, for small shapes: :math:`Q = L L^\top`.

    Parameter: ``L`` ``[P, P]``, starting at the identity, P = m n being the number of entries; a leading
    axis for groups.

    Args:
        shape: ``(m, n)`` or ``(groups, m, n)``.
        max_dim: The largest P allowed.
        dtype: Of λ.
        device: Of λ.

    Raises:
        ValueError: If P is larger than ``max_dim``.

    Example:
        >>> import torch
        >>> q = Dense((2, 2))
        >>> q.scale_(0.25)
        >>> q.dense().diagonal().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    L: Tensor

    def _setup(self) -> None:
        size = self.m * self.n
        if size > self.max_dim:
            raise ValueError(
                f"family 'dense' needs a {size} x {size} matrix, and must stay <= {self.max_dim}; use 'kfac', or "
                "FisherOperator(...).inverse(rank=...) for all parameters together"
            )
        self.side = Side(size, 1, size)
        self._parameter("L", self._eye(self.side))

    def roots(self) -> Roots:
        return (self.L,)

    def _mul(self, x: Packed, matrix: Tensor) -> Tensor:
        x = dense(x)
        return (x.flatten(-2).unsqueeze(-2) @ matrix).view(x.shape)  # "... m n -> ... 1 (m n)"

    def whiten(self, roots: Roots, u: Packed) -> Packed:
        return self._mul(u, roots[0])

    def color(self, roots: Roots, z: Packed) -> Packed:
        return self._mul(z, roots[0].mT)

    def operator(self) -> Roots:
        return (self.L @ self.L.mT,)

    def act(self, operator: Roots, u: Packed) -> Packed:
        return self._mul(u, operator[0])

    def relative(self, operator: Roots, u: Packed, v: Packed, w: Packed) -> Gradients:
        x, y = (dense(t).flatten(-2).unsqueeze(-2) for t in (u, w))
        return {"L": self.side.gradient(x, y, (self.L,))}

    def retract_(self, operator: Roots, gradients: Gradients, rate: Tensor, ok: Tensor | None = None) -> Carry | None:
        self.side.retract_(operator[0], (self.L,), gradients["L"], rate, ok)
        return None

    def flops(self) -> int:
        return 2 * self.L.numel()

    def diagonal(self) -> Tensor:
        return self.L.square().sum(-1).view(self.shape)

    def logdet(self) -> Tensor:
        logdet: Tensor = 2 * torch.linalg.slogdet(self.L).logabsdet.sum()
        return logdet


def exp_root(s: Tensor) -> Tensor:
    """Return e^s, saturated where its square would leave float32."""
    return s.clamp(-_S_LIMIT, _S_LIMIT).exp()
