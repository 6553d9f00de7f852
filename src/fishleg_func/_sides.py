"""One side of a Kronecker product: dense, or block-diagonal where it is long."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Side(NamedTuple):
    """A matrix acting on an axis of length ``dim``, kept as ``blocks`` diagonal blocks of ``size``.

    Where the blocks do not divide the axis, it is padded; the padded coordinates are dropped again, so that the matrix
    acting on the axis is a principal submatrix of the stored one, and positive definite with it.
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
        return self.merge(self.split(x) @ matrix)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the diagonal blocks of :math:`x^\top y`, summed over rows, in the shape of :meth:`eye`."""
        return self.split(x).mT @ self.split(y)

    def diagonal(self, blocks: Tensor) -> Tensor:
        """Cut per-block vectors, ``[..., size]`` or ``[..., blocks, size]``, to the axis: ``[..., dim]``."""
        return blocks if self.blocks == 1 else blocks.flatten(-2)[..., : self.dim]
