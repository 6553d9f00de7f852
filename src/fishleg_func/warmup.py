r"""The first steps, whose directions a few singular values would rule.

Statistics of a few batches know little of F, and Q g is then nearly what the batch's mean gradient is: a matrix of a
few large singular values. Scaled to the length of a step, these take nearly all of it. For :data:`STEPS` steps the
largest are made alike, and the direction as long as before, so that more than a few move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._linalg import eigh
from ._noise import Noise
from ._opaque import opaque
from ._trees import inverse_or_zero
from .momentum import Direction
from .qmodules import QModule

STEPS = 10  # first steps that are levelled, of those that take statistics
_ROUNDS = 2  # of subspace iteration
_LEAST = 1e-2  # of the largest singular value: smaller ones are left alone, being rounding where batches are small


def warms_up(rank: int, t: int) -> bool:
    """Tell whether the direction of step t may be levelled; compiled code, which is the same for all t, asks later."""
    return rank > 0 and (torch.compiler.is_compiling() or t < STEPS)


def warmed(direction: Direction, q: Mapping[str, QModule], last: str | None, rank: int, t: int) -> Direction:
    """Return the direction of step t: in the first steps with the leading singular values of its matrices made alike.

    Args:
        direction: By block; it is not written to. The norms stay.
        q: Tells which blocks are matrices: Q of these acts on both sides, and both are of twice the rank at least.
        last: The block that is called last, whose direction stays: rows that belong to classes need not move alike.
        rank: How many singular values.
        t: Steps so far.
    """

    def chosen(name: str, p: Tensor) -> bool:
        return name != last and q[name].two_sided and min(p.shape[-2:]) >= 2 * rank

    return direction._replace(p={k: level(p, rank, t) if chosen(k, p) else p for k, p in direction.p.items()})


def _level(p: Tensor, rank: int, t: int) -> Tensor:
    r"""Return p with its leading singular values as small as the least of them, at its old norm.

    With V the leading right singular vectors, :math:`\Sigma` their singular values and :math:`\sigma` the least of
    these, this is :math:`p + pV(\sigma\Sigma^{-1} - I)V^\top`, scaled. V is found by subspace iteration among twice as
    many vectors.

    Args:
        p: Shape ``[..., m, n]``, each matrix for itself.
        rank: How many singular values.
        t: Steps so far; after the first ones p is returned.
    """
    if t >= STEPS:
        return p.clone()
    norm = _norm(p)
    unit = p * inverse_or_zero(norm)
    v = Noise(0, p.device).normal(unit[..., : 2 * rank, :]).mT
    for _ in range(_ROUNDS):
        v = torch.linalg.qr(unit.mT @ (unit @ v)).Q
    y = unit @ v
    squares, w = eigh((y.mT @ y).nan_to_num())  # what is not finite is for others to find
    squares, w = squares[..., -rank:], w[..., -rank:]
    large = squares > _LEAST**2 * squares[..., -1:]
    least = torch.where(large, squares, torch.inf).amin(-1, keepdim=True)
    change = torch.where(large, (least / squares).sqrt(), 1) - 1
    new = unit + (y @ w * change.unsqueeze(-2)) @ (v @ w).mT
    return new * (norm * inverse_or_zero(_norm(new)))


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm


level = opaque("(Tensor p, int rank, SymInt t) -> Tensor", result=lambda p, rank, t: torch.empty_like(p))(_level)
