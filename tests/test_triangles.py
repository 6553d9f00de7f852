"""Two matrices in one: neither touches the other, and each is what it would be alone."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fishleg_func as ff
from fishleg_func import _linalg
from fishleg_func._opaque import LONG
from fishleg_func._triangles import average_symmetric_, pair_of, symmetric_of, upper_of, write_upper_

SHAPES = [(1,), (5,), (2, 4), (LONG,), (3 * _linalg.LEAF + 7,), (2, _linalg.LEAF + 1)]
ALLOWED = [None, True, False]


def filled(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pair and what it was filled with."""
    square = (*shape, shape[-1])
    upper, symmetric = randn(*square).triu(), randn(*square, seed=1)
    symmetric = symmetric + symmetric.mT
    pair = pair_of(upper)
    average_symmetric_(pair, symmetric, torch.tensor(1.0, dtype=torch.float64), None)
    return pair, upper, symmetric


def flag(ok: bool | None) -> Tensor | None:
    return None if ok is None else torch.tensor(ok)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_holds_both_matrices(shape: tuple[int, ...]) -> None:
    pair, upper, symmetric = filled(shape)
    assert pair.shape == (*shape[:-1], shape[-1] + 1, shape[-1])
    assert torch.equal(upper_of(pair), upper)
    assert torch.equal(symmetric_of(pair), symmetric)


@pytest.mark.parametrize("ok", ALLOWED)
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_averaging_moves_the_symmetric_matrix_only(shape: tuple[int, ...], factored: bool, ok: bool | None) -> None:
    pair, upper, symmetric = filled(shape)
    a = randn(*shape[:-1], 3, shape[-1], seed=2)
    weights = torch.rand(*shape[:-1], 3, 1, dtype=torch.float64)
    new = ff.LowRank(a * weights, a)
    weight = torch.tensor(0.3, dtype=torch.float64)
    average_symmetric_(pair, new if factored else new.dense(), weight, flag(ok))
    expected = symmetric if ok is False else 0.7 * symmetric + 0.3 * new.dense()
    assert_close(symmetric_of(pair), expected, 1e-12)
    assert torch.equal(upper_of(pair), upper)


@pytest.mark.parametrize("ok", ALLOWED)
@pytest.mark.parametrize("shape", SHAPES)
def test_writing_moves_the_triangular_matrix_only(shape: tuple[int, ...], ok: bool | None) -> None:
    pair, upper, symmetric = filled(shape)
    new = randn(*upper.shape, seed=3).triu()
    write_upper_(pair, new, flag(ok))
    assert torch.equal(upper_of(pair), upper if ok is False else new)
    assert torch.equal(symmetric_of(pair), symmetric)


@given(size=st.integers(1, 9), draws=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_basis_whitens_what_was_gathered(size: int, draws: int, seed: int) -> None:
    """Compare C of both sides with the dense inverse of the damped means, which the pairs keep beside it."""
    q = ff.families.KFAC((size + 1, size), dtype=torch.float64)
    cov_l, cov_r = torch.zeros(size, size).double(), torch.zeros(size + 1, size + 1).double()
    for i in range(draws):
        z = ff.LowRank(randn(4, size + 1, seed=seed + i), randn(4, size, seed=seed + i + 50))
        q.gather_(z)
        cov_l += z.a.mT @ z.a / 4 / draws
        cov_r += z.d.mT @ z.d / draws
    q.refresh_(torch.tensor(0.1, dtype=torch.float64))
    assert_close(q.cov_L, cov_l, 1e-12)
    assert_close(q.cov_R, cov_r, 1e-12)
    pi = ((cov_l.trace() / size) / (cov_r.trace() / (size + 1))).sqrt()
    for basis, cov, rho in ((q.C_L, cov_l, pi * 0.1**0.5), (q.C_R, cov_r, 0.1**0.5 / pi)):
        assert_close(basis @ basis.mT, torch.linalg.inv(cov + rho * torch.eye(len(cov)).double()), 1e-9)


def test_the_basis_and_its_statistics_take_one_square_for_each_side() -> None:
    q = ff.families.KFAC((30, 40))
    kept = sum(t.numel() for t in (*q.parameters(), *q.buffers()))
    squares = 30**2 + 40**2
    assert kept == 2 * squares + 30 + 40 + 1  # lambda; the basis with its statistics; their count
