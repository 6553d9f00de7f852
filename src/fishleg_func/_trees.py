"""Algebra of packed matrices, dense or factored, and of dictionaries of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ._opaque import LONG, opaque, readable, refused, unless_granted
from ._types import LowRank, Packed, Symmetrized


def dense(u: Packed | Symmetrized) -> Tensor:
    """Return ``u`` as a dense tensor ``[..., m, n]``."""
    return u if isinstance(u, Tensor) else u.dense()


def cast(u: Packed, dtype: torch.dtype) -> Packed:
    """Return ``u`` in another dtype."""
    return LowRank(u.d.to(dtype), u.a.to(dtype)) if isinstance(u, LowRank) else u.to(dtype)


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
    if isinstance(u, LowRank):
        return (rows_times(u.d, v) * u.a).sum()
    return inner(v, u) if isinstance(v, LowRank) else (u * v).sum()


def rows_times(x: Tensor, u: Packed) -> Tensor:
    """Return the product of rows ``[..., rows, m]`` and ``u``, shape ``[..., rows, n]``."""
    return (x @ u.d.mT) @ u.a if isinstance(u, LowRank) else x @ u


def transposed(u: Packed) -> Packed:
    """Return ``u`` transposed."""
    return LowRank(u.a, u.d) if isinstance(u, LowRank) else u.mT


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum 0-d tensors."""
    return torch.stack(list(terms)).sum()


def checksum(u: Mapping[str, Packed]) -> Tensor:
    """Return a 0-d tensor that is finite only if all entries are: their sum, of factors a bound on the product."""
    return total(
        (vector_norm(x.d, dim=-1) * vector_norm(x.a, dim=-1)).sum() if isinstance(x, LowRank) else x.sum()
        for x in u.values()
    )


def norm_bound(u: Packed) -> Tensor:
    """Return the Frobenius norm, of factors a bound on that of the product; 0-d, finite only if all entries are."""
    return checksum({"": u}) if isinstance(u, LowRank) else vector_norm(u)


def square_checksum(u: Mapping[str, Packed]) -> Tensor:
    """Return a 0-d tensor that is finite only if all squares of entries, or of entries of the factors, are."""
    parts = [part for x in u.values() for part in (x if isinstance(x, LowRank) else (x,))]
    return total(part.square().sum() for part in parts)


def inverse_or_zero(x: Tensor) -> Tensor:
    """Return ``1 / x`` where x is positive and its inverse far from overflow, and zero elsewhere.

    So a zero vector stays zero when normalized.
    """
    positive = x > 2**20 * torch.finfo(x.dtype).tiny
    return torch.where(positive, 1 / torch.where(positive, x, 1), 0)


def assign_(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    """Write ``value`` into ``target``; with ``ok``, a 0-d bool, only where it is true."""
    target.copy_(value if ok is None else torch.where(ok, value, target))


def add_product_(target: Tensor, a: Tensor, b: Tensor, ok: Tensor | None) -> None:
    """Add the matrix product ``a @ b`` to ``target``; with ``ok``, a 0-d bool, only where it is true."""
    if ok is not None:
        assign_(target, target + a @ b, ok)
    elif target.ndim == 2:
        target.addmm_(a, b)
    else:
        target.add_(a @ b)


def average_(target: Tensor, new: Packed, weight: Tensor, ok: Tensor | None) -> None:
    """Move ``target`` towards ``new`` by the fraction ``weight``, 0-d; with ``ok`` only where it is true.

    A factored ``new`` is multiplied out into the target, without a temporary of its size.
    """
    if isinstance(new, LowRank):
        average = opaque_average_product_ if min(target.shape[-2:]) >= LONG else average_product_
        average(target, new.d, new.a, weight, ok)
    elif ok is None:
        target.lerp_(new, weight)
    else:
        assign_(target, torch.lerp(target, new, weight), ok)


def average_product_(target: Tensor, d: Tensor, a: Tensor, weight: Tensor, ok: Tensor | None) -> None:
    """Move ``target`` towards the matrix product ``d.mT @ a`` by the fraction ``weight``, as :func:`average_` does."""
    if refused(ok):
        return
    ok = unless_granted(ok)
    if ok is None and target.ndim == 2 and readable(weight):
        target.addmm_((d * weight).mT, a, beta=1 - float(weight))
    elif ok is None:
        add_product_(target.mul_(1 - weight), (d * weight).mT, a, None)
    else:
        assign_(target, torch.lerp(target, d.mT @ a, weight), ok)


opaque_average_product_ = opaque(
    "(Tensor(a!) target, Tensor d, Tensor a, Tensor weight, Tensor? ok) -> ()",
    mutates=("target",),
    result=lambda target, d, a, weight, ok: None,
)(average_product_)


def descend_(target: Tensor, keep: Tensor | None, direction: Tensor, rate: Tensor, ok: Tensor | None) -> None:
    """Write ``keep * target - rate * direction``; with ``ok`` only where it is true. ``keep=None`` is one.

    A target of lower precision than the direction is rounded once.
    """
    if ok is None and target.dtype == direction.dtype:
        if keep is not None:
            target.mul_(keep)
        target.addcmul_(direction, rate, value=-1)
    else:
        wide = target.to(direction.dtype)
        assign_(target, (wide if keep is None else keep * wide) - rate * direction, ok)
