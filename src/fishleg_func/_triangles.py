"""Two square matrices in the memory of one: an upper triangular one, and a symmetric one.

A *pair* has the shape ``[..., n + 1, n]``. Its first n rows hold the triangular matrix on and above their diagonal, its
last n rows the symmetric one on and below theirs; the two do not meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._linalg import LEAF
from ._opaque import LONG, opaque
from ._trees import assign_, average_product_
from ._types import LowRank, Packed


def pair_of(upper: Tensor) -> Tensor:
    """Return the pair of an upper triangular matrix ``[..., n, n]`` and of zeros."""
    return torch.nn.functional.pad(upper.triu(), (0, 0, 0, 1))


def upper_of(pair: Tensor) -> Tensor:
    """Return a copy of the triangular matrix, ``[..., n, n]``."""
    return pair[..., :-1, :].triu()


def symmetric_of(pair: Tensor) -> Tensor:
    """Return a copy of the symmetric matrix, ``[..., n, n]``."""
    lower = pair[..., 1:, :].tril()
    return lower + lower.tril(-1).mT


def write_upper_(pair: Tensor, upper: Tensor, ok: Tensor | None) -> None:
    """Replace the triangular matrix.

    Args:
        pair: Shape ``[..., n + 1, n]``.
        upper: Shape ``[..., n, n]``, zero below its diagonal.
        ok: Where given and false, nothing is changed.
    """
    rows = pair[..., :-1, :]
    assign_(rows, rows.tril(-1) + upper, ok)


def average_symmetric_(pair: Tensor, new: Packed, weight: Tensor, ok: Tensor | None) -> None:
    """Move the symmetric matrix towards a symmetric ``new`` by the fraction ``weight``.

    Args:
        pair: Shape ``[..., n + 1, n]``.
        new: Shape ``[..., n, n]``; of a factored one only the lower triangle is multiplied out.
        weight: 0-d.
        ok: Where given and false, nothing is changed.
    """
    if not isinstance(new, LowRank):
        _average_leaf_(pair[..., 1:, :], new, weight, ok)
    elif pair.shape[-1] < LONG:
        _average_triangle_(pair, new.d, new.a, weight, ok)
    else:
        average_triangle_(pair, new.d, new.a, weight, ok)


def _average_triangle_(pair: Tensor, d: Tensor, a: Tensor, weight: Tensor, ok: Tensor | None) -> None:
    _average_halves_(pair[..., 1:, :], d, a, weight, ok)


average_triangle_ = opaque(
    "(Tensor(a!) pair, Tensor d, Tensor a, Tensor weight, Tensor? ok) -> ()",
    mutates=("pair",),
    result=lambda pair, d, a, weight, ok: None,
)(_average_triangle_)


def _average_halves_(square: Tensor, d: Tensor, a: Tensor, weight: Tensor, ok: Tensor | None) -> None:
    n = square.shape[-1]
    if n <= LEAF:
        return _average_leaf_(square, d.mT @ a, weight, ok)
    h = n // 2
    for half in (slice(h), slice(h, n)):
        _average_halves_(square[..., half, half], d[..., half], a[..., half], weight, ok)
    return average_product_(square[..., h:, :h], d[..., h:], a[..., :h], weight, ok)


def _average_leaf_(square: Tensor, new: Tensor, weight: Tensor, ok: Tensor | None) -> None:
    """Move what is on and below the diagonal, and nothing else."""
    assign_(square, torch.lerp(square, new, weight).tril() + square.triu(1), ok)
