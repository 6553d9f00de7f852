"""Q in its own eigenbasis, where it is inverted and where its damping is changed."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .bases import Diagonal, Eigen, Embedding
from .inverse import InverseFisher
from .kronecker import Kronecker, ScaledKronecker
from .qmodules import Dense, QModule
from .spiked import Spiked

_DENSE_LIMIT = 4096  # entries of a block whose matrix is factorized for want of a structure


class Spectrum(NamedTuple):
    r"""The eigenvalues of the Fisher of a block, as Q has them: :math:`\max(1/q - \gamma, 0)` for each q of Q.

    Attributes:
        values: Eigenvalues, non-negative, float64, one for each entry of the block.
        build: From values of the same shape to the Q module that has them as its eigenvalues in this basis.
    """

    values: Tensor
    build: Callable[[Tensor], QModule]


Spectra = Mapping[str, Spectrum]


@torch.no_grad()
def spectra(inverse: InverseFisher) -> dict[str, Spectrum]:
    """Return the spectrum of every block, by name.

    Raises:
        ValueError: If a large block is of a family without a basis of its own.
    """
    found = {}
    for name, q in inverse.q.items():
        values, build = _eigenvalues(q, name)
        found[name] = Spectrum((1 / values - inverse.damping).clamp(min=0), build)
    return found


def rebuilt(
    inverse: InverseFisher, parts: Spectra, function: Callable[[Tensor], Tensor], damping: float
) -> InverseFisher:
    r"""Return the operator with eigenvalues :math:`g(\lambda)` in place of :math:`1 / (\lambda + \gamma)`.

    Args:
        inverse: Where the parts are from.
        parts: From :func:`spectra`.
        function: g, elementwise.
        damping: γ that it reports.
    """
    q = {name: part.build(function(part.values)) for name, part in parts.items()}
    blocks = [replace(b, family=type(q[b.name]).__name__.lower()) for b in inverse.blocks]
    params = inverse.unflatten(torch.zeros(inverse.shape[0], dtype=inverse.dtype, device=inverse.device))
    return InverseFisher(blocks, q, params, damping)


def _eigenvalues(q: QModule, name: str) -> tuple[Tensor, Callable[[Tensor], QModule]]:
    """Return the eigenvalues of Q, and how to build another Q with its eigenvectors."""
    if isinstance(q, Diagonal):
        return q.diagonal().double(), functools.partial(_with_roots, q)
    if isinstance(q, Eigen):
        return q.roots()[2].double().square(), functools.partial(_with_roots, q)
    if isinstance(q, Embedding) and q.left.blocks == 1:
        left, vectors = _factor((q.C_L, q.L))
        values = q.roots()[2].double().square() * left.unsqueeze(-2)
        rows = Eigen(q.shape, max_dim=q.n, dtype=q.L.dtype, device=q.L.device)  # the longer side is not rotated
        rows.C_L.copy_(vectors)
        return values, functools.partial(_with_roots, rows)
    if isinstance(q, Kronecker) and not isinstance(q, ScaledKronecker) and q.left.blocks == q.right.blocks == 1:
        (left, vectors_l), (right, vectors_r) = (_factor(chain) for chain in q.chains())
        rotated = Eigen(q.shape, max_dim=max(q.m, q.n), dtype=q.L.dtype, device=q.L.device)
        rotated.C_L.copy_(vectors_l)
        rotated.C_R.copy_(vectors_r)
        return right.unsqueeze(-1) * left.unsqueeze(-2), functools.partial(_with_roots, rotated)
    if isinstance(q, Spiked):
        values = q.operator()[1].double()
        rest = values[..., -1:].expand(*q.groups, q.m * q.n - q.rank)
        return torch.cat([values[..., :-1], rest], -1), functools.partial(_with_spikes, q)
    if isinstance(q, Dense):
        values, vectors = _factor((q.L,))
        return values, functools.partial(_with_vectors, q.shape, vectors, q.L)
    return _from_matrix(q, name)


def _factor(chain: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of E Eᵀ, E being the product of a chain: from E, whose digits suffice."""
    root = functools.reduce(torch.matmul, [matrix.double() for matrix in chain])
    vectors, singular, _ = torch.linalg.svd(root)
    return singular.square(), vectors


def _with_roots(q: Diagonal | Eigen, values: Tensor) -> QModule:
    """Return a copy of q with other eigenvalues."""
    new = copy.deepcopy(q)
    with torch.no_grad():
        new.s.zero_()
        new.c.copy_(values.sqrt())
    return new


def _with_spikes(q: Spiked, values: Tensor) -> QModule:
    """Return a copy of q with other eigenvalues, the last of them across its vectors."""
    new = copy.deepcopy(q)
    new.place_(new.V, torch.cat([values[..., : q.rank], values[..., -1:]], -1))
    return new


def _with_vectors(shape: tuple[int, ...], vectors: Tensor, like: Tensor, values: Tensor) -> QModule:
    """Return the dense Q with these eigenvectors and eigenvalues."""
    new = Dense(shape, max_dim=vectors.shape[-1], dtype=like.dtype, device=like.device)
    with torch.no_grad():
        new.L.copy_(vectors * values.sqrt().unsqueeze(-2))
    return new


def _from_matrix(q: QModule, name: str) -> tuple[Tensor, Callable[[Tensor], QModule]]:
    """Take the eigenvalues of the matrix itself."""
    size, groups = math.prod(q.shape[-2:]), math.prod(q.shape[:-2])
    if size * groups > _DENSE_LIMIT:
        raise ValueError(
            f"Q of {name!r} of {size * groups} entries, a {type(q).__name__}, must be of <= {_DENSE_LIMIT} to be "
            "inverted; use q='kfac' or 'eigen', whose eigenvectors are known, and max_dim >= each side"
        )
    matrix = q.dense().double().view(groups, size, groups, size)  # [g, size, g, size]
    blocks = matrix.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(*q.shape[:-2], size, size)
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    like = next(q.parameters())
    tiny = torch.finfo(like.dtype).eps * values.amax(-1, keepdim=True)
    return torch.maximum(values, tiny), functools.partial(_with_vectors, q.shape, vectors, like)
