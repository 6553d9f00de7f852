"""Algebra of packed matrices, dense or factored, and of dictionaries of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._types import LowRank, Packed


def dense(u: Packed) -> Tensor:
    """Return ``u`` as a dense tensor ``[..., m, n]``."""
    return u.dense() if isinstance(u, LowRank) else u


def scale(u: Packed, factor: Tensor) -> Packed:
    """Multiply ``u`` by the 0-d tensor ``factor``."""
    return LowRank(u.d * factor, u.a) if isinstance(u, LowRank) else u * factor


def add(u: Packed, v: Packed) -> Packed:
    """Add two packed matrices; factors stay factored, and are merged where ``a`` is the same tensor."""
    if not (isinstance(u, LowRank) and isinstance(v, LowRank)):
        return dense(u) + dense(v)
    if u.a is v.a:
        return LowRank(u.d + v.d, u.a)
    return LowRank(torch.cat((u.d, v.d), -2), torch.cat((u.a, v.a), -2))


def inner(u: Packed, v: Packed) -> Tensor:
    r"""Return :math:`\langle u, v \rangle` as a 0-d tensor, by Gram matrices of the rows where both are factored."""
    if isinstance(u, LowRank) and isinstance(v, LowRank):
        return ((u.d @ v.d.mT) * (u.a @ v.a.mT)).sum()
    return (dense(u) * dense(v)).sum()


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum 0-d tensors."""
    return torch.stack(list(terms)).sum()


def inverse_or_zero(x: Tensor) -> Tensor:
    """Return ``1 / x`` where ``x > 0`` and zero elsewhere, so that a zero vector stays zero when normalized."""
    positive = x > 0
    return torch.where(positive, 1 / torch.where(positive, x, 1), 0)


def assign_(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    """Write ``value`` into ``target``; with ``ok``, a 0-d bool, only where it is true."""
    target.copy_(value if ok is None else torch.where(ok, value, target))
