r"""One side of a Kronecker product: dense, or block-diagonal where it is long.

On one side, :math:`Q` is :math:`K = EE^\top` with E the product of a *chain* of matrices, the last of which is learned:
``(L,)``, or ``(C, L)`` in a basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._linalg import outer_square
from ._opaque import LONG, opaque, refused, unless_granted
from ._trees import add_product_, assign_
from ._types import Shift, Symmetrized

Chain = Sequence[Tensor]


class Side(NamedTuple):
    """A matrix acting on an axis of length ``dim``, kept as ``blocks`` diagonal blocks of ``size``.

    Where the blocks do not divide the axis, it is padded; the padded coordinates are dropped again, so that each matrix
    acts on the axis as a principal submatrix of the stored one, and is positive definite with it.
    """

    dim: int
    blocks: int
    size: int

    @staticmethod
    def of(dim: int, max_dim: int) -> Side:
        """Split an axis into the fewest blocks no longer than ``max_dim``."""
        blocks = -(-dim // max_dim)
        return Side(dim, blocks, -(-dim // blocks))

    def eye(self, groups: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
        """Return identities, shape ``[*groups, dim, dim]`` or ``[*groups, blocks, size, size]``."""
        lead = groups if self.blocks == 1 else (*groups, self.blocks)
        return torch.eye(self.size, dtype=dtype, device=device).repeat(*lead, 1, 1)

    def split(self, x: Tensor) -> Tensor:
        """Cut the last axis: ``[..., rows, dim]`` to ``[..., blocks, rows, size]``; nothing to do for one block."""
        if self.blocks == 1:
            return x
        # "... r (b s) -> ... b r s", padded
        return (
            F.pad(x, (0, self.blocks * self.size - self.dim))
            .view(*x.shape[:-1], self.blocks, self.size)
            .movedim(-2, -3)
        )

    def merge(self, x: Tensor) -> Tensor:
        """Undo :meth:`split`."""
        if self.blocks == 1:
            return x
        # "... b r s -> ... r (b s)", cut
        return x.movedim(-3, -2).flatten(-2)[..., : self.dim]

    def mul(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Multiply the last axis of ``x``, shape ``[..., rows, dim]``, by ``matrix`` from the right."""
        x = self.split(x)
        # several threads multiply few rows faster as the columns of a product from the left (docs/performance.md)
        few = x.ndim == 2 and x.is_cpu and x.shape[0] < self.size and _threads() > 1
        return self.merge((matrix.mT @ x.mT).mT if few else x @ matrix)

    def mul_first(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Multiply the first axis of ``x``, shape ``[..., dim, columns]``, by ``matrix`` from the left."""
        return matrix @ x if self.blocks == 1 else self.mul(x.mT, matrix.mT).mT

    def solve(self, x: Tensor, operator: Tensor) -> Tensor:
        """Return x K⁻¹ for rows ``[..., rows, dim]``, up to rounding; K from :meth:`operator`."""
        return self.merge((times_inverse if self.size >= LONG else _times_inverse)(self.split(x), operator))

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the diagonal blocks of :math:`x^\top y`, summed over rows, in the shape of :meth:`eye`."""
        return self.split(x).mT @ self.split(y)

    def whiten(self, x: Tensor, chain: Chain) -> Tensor:
        """Return x E."""
        for matrix in chain:
            x = self.mul(x, matrix)
        return x

    def color(self, x: Tensor, chain: Chain) -> Tensor:
        """Return x Eᵀ."""
        for matrix in reversed(chain):
            x = self.mul(x, matrix.mT)
        return x

    def operator(self, chain: Chain) -> Tensor:
        """Return K, in the shape of :meth:`eye`."""
        matrices = self._trimmed(chain)
        return square(matrices) if self.size >= LONG else _square(matrices)

    def logdet(self, chain: Chain) -> Tensor:
        """Return the logarithm of the determinant of K, summed over blocks and groups: 0-d."""
        whole = self.blocks * self.size == self.dim
        pad = 0 if whole else torch.eye(self.size).to(chain[0]) - self._trimmed([torch.eye(self.size).to(chain[0])])[0]
        return 2 * torch.stack([torch.linalg.slogdet(m + pad).logabsdet.sum() for m in self._trimmed(chain)]).sum()

    def _trimmed(self, chain: Chain) -> Chain:
        """Return the matrices without what they have in padded coordinates."""
        padding = self.blocks * self.size - self.dim
        if not padding:
            return chain
        real = torch.ones(self.blocks, self.size, dtype=chain[0].dtype, device=chain[0].device)
        real[-1, self.size - padding :] = 0
        return [real.unsqueeze(-1) * matrix * real.unsqueeze(-2) for matrix in chain]

    def gradient(self, x: Tensor, y: Tensor, chain: Chain) -> Tensor | Symmetrized:
        r"""Return :math:`G = E^\top (x^\top y + y^\top x) E`, factored where moving along it is cheaper so.

        Args:
            x: Rows, ``[..., rows, dim]``.
            y: Rows like ``x``.
            chain: What E is the product of.
        """
        rows = x.shape[-2]
        if rows < self.size:
            raw = torch.cat((x, y), -2)
            whitened = self.split(self.whiten(raw, chain))
            pair = Symmetrized(whitened[..., :rows, :], whitened[..., rows:, :], self.split(raw))
            return pair if _prefers_factors(rows, self.size) else pair.dense()
        half = self.gram(x, y)
        for matrix in self._trimmed(chain):
            half = matrix.mT @ half @ matrix
        return half + half.mT

    def retract_(
        self, operator: Tensor, chain: Chain, gradient: Tensor | Symmetrized, rate: Tensor, ok: Tensor | None
    ) -> Shift | None:
        r"""Move the learned matrix, :math:`L \leftarrow L(I - \eta G / \max(1, \|G\|_F))`, and K with it, in place.

        With a factored :math:`G = P^\top S`, P being x over y and S being y over x, and with :math:`Z_P = EP^\top`, the
        new K is :math:`K + Z_P (\sigma^2 SP^\top - 2\sigma I) Z_S^\top`, σ being the length of the step.

        Args:
            operator: K.
            chain: What E is the product of.
            gradient: G, from :meth:`gradient`.
            rate: η, 0-d.
            ok: Where given and false, nothing is changed.

        Returns:
            How K has changed, where the gradient was factored.
        """
        lam = chain[-1]
        *basis, present = self._trimmed(chain)
        if isinstance(gradient, Symmetrized):
            move = move_ if self.size >= LONG else _move_
            return Shift(gradient.raw, move(operator, lam, present, basis, gradient.x, gradient.y, rate, ok))
        norm = torch.linalg.matrix_norm(gradient, keepdim=True)
        add_product_(lam, present.clone(), gradient * (-rate / norm.clamp(min=1)), ok)
        assign_(operator, self.operator(chain), ok)
        return None

    def shifted(self, x: Tensor, shift: Shift) -> Tensor:
        """Return ``x (I + shift.xᵀ shift.y)``, what x K has become by the change of K."""
        if x.ndim == 2 and self.blocks == 1:
            return torch.addmm(x, x @ shift.x.mT, shift.y)
        return x + self.merge((self.split(x) @ shift.x.mT) @ shift.y)

    def shifted_first(self, x: Tensor, shift: Shift) -> Tensor:
        """Return ``(I + shift.yᵀ shift.x) x``, what K x has become by the change of K."""
        if x.ndim == 2 and self.blocks == 1:
            return torch.addmm(x, shift.y.mT, shift.x @ x)
        return self.shifted(x.mT, shift).mT

    def diagonal(self, blocks: Tensor) -> Tensor:
        """Cut per-block vectors, ``[..., size]`` or ``[..., blocks, size]``, to the axis: ``[..., dim]``."""
        return blocks if self.blocks == 1 else blocks.flatten(-2)[..., : self.dim]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    """Return how many threads share a product: a constant in compiled code, which is compiled anew where it changes."""
    return torch.get_num_threads()


def _prefers_factors(rows: int, size: int) -> bool:
    """Tell whether moving L and K along a gradient of so many rows takes fewer FLOPs factored than dense."""
    return 7 * rows * size + 4 * rows * rows < 3 * size * size


def _times_inverse(x: Tensor, matrix: Tensor) -> Tensor:
    r"""Return :math:`x (K + \epsilon I)^{-1}` with ε of the size of K's rounding, zero where K is not definite so.

    Args:
        x: Rows, ``[..., rows, n]``.
        matrix: K, positive definite up to rounding and to padded coordinates, which are zero: ``[..., n, n]``.
    """
    info, diagonal = torch.finfo(matrix.dtype), matrix.diagonal(dim1=-2, dim2=-1)
    unit = diagonal.amax(-1)[..., None, None].clamp(min=info.tiny)  # K has no larger entry; squares of it overflow
    scaled = matrix / unit
    floor = 4 * info.eps * torch.linalg.matrix_norm(scaled) + info.tiny
    scaled.diagonal(dim1=-2, dim2=-1).add_(floor.unsqueeze(-1))
    lower, failed = torch.linalg.cholesky_ex(scaled)
    result = torch.cholesky_solve((x / unit).mT, lower).mT
    return torch.where(failed[..., None, None] == 0, result, 0).contiguous()


times_inverse = opaque("(Tensor x, Tensor matrix) -> Tensor", result=lambda x, matrix: x.new_empty(x.shape))(
    _times_inverse
)


def _square(chain: Chain) -> Tensor:
    """Return the product of matrices times its own transpose."""
    root, *rest = chain
    for matrix in rest:
        root = root @ matrix
    return outer_square(root)


square = opaque("(Tensor[] chain) -> Tensor", result=lambda chain: chain[0].new_empty(chain[0].shape))(_square)


def _move_(
    operator: Tensor,
    lam: Tensor,
    present: Tensor,
    basis: Chain,
    x: Tensor,
    y: Tensor,
    rate: Tensor,
    ok: Tensor | None,
) -> Tensor:
    """Move the learned matrix and K along a factored gradient, and return what K is to the right of ``raw``'s rows."""
    pair, swapped = torch.cat((x, y), -2), torch.cat((y, x), -2)
    if refused(ok):
        return torch.zeros_like(pair)
    ok = unless_granted(ok)
    gram = swapped @ pair.mT
    squared = (gram * gram.mT).sum((-2, -1), keepdim=True)  # tr G² = |G|²: G is symmetric
    sigma = rate / squared.clamp(min=1).sqrt()
    moved = present @ pair.mT
    add_product_(lam, moved, swapped * -sigma, ok)
    for matrix in reversed(basis):
        moved = matrix @ moved
    middle = sigma.square() * gram
    middle.diagonal(dim1=-2, dim2=-1).sub_(2 * sigma.squeeze(-1))
    change = middle @ torch.cat(moved.chunk(2, -1)[::-1], -1).mT
    add_product_(operator, moved, change, ok)
    return change


move_ = opaque(
    "(Tensor(a!) operator, Tensor(b!) lam, Tensor present, Tensor[] basis, Tensor x, Tensor y, Tensor rate, Tensor? ok)"
    " -> Tensor",
    mutates=("operator", "lam"),
    result=lambda operator, lam, present, basis, x, y, rate, ok: x.new_empty(
        *x.shape[:-2], 2 * x.shape[-2], x.shape[-1]
    ),
)(_move_)
