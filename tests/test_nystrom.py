"""The low-rank inverse of the Fisher against dense matrices in float64, and what it is good for."""

import io
import math
from typing import Any

import pytest
import torch
from after import CATEGORICAL, GAMMA, data, mlp
from cases import assert_close, assert_same, filled, generator, randn, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.nystrom import nystrom
from fishleg_func.spiked import Spiked

SIZE = 31  # parameters of the MLP, whose Fisher of five images has rank 10: one direction of the logits has none


def operator(n: int = 5, damping: float = GAMMA, seed: int = 0) -> tuple[ff.FisherOperator, Tensor]:
    """The damped Fisher of some images, and its dense inverse."""
    model, (x, _) = mlp(), data(n, seed)
    F = reference.fisher(model, x, "categorical")
    return ff.FisherOperator(model, CATEGORICAL, [(x, None)], damping=damping), reference.damped_inverse(F, damping)


def spectrum(size: int, values: Tensor, seed: int) -> Tensor:
    """A matrix with these eigenvalues and else zeros."""
    V = torch.linalg.qr(randn(size, len(values), seed=seed)).Q
    return V @ torch.diag(values) @ V.T


# --- the approximation ---


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**16))
def test_nystrom_is_from_below_and_exact_at_full_rank(rank: int, of: int, seed: int) -> None:
    A = spectrum(12, 10 ** (-3 * torch.rand(of, generator=generator(seed)).double()), seed)
    columns = 0

    def multiply(v: Tensor) -> Tensor:
        nonlocal columns
        columns += v.shape[1]
        return A @ v

    V, mu = nystrom(multiply, 12, rank, generator(seed), A)
    assert columns == rank
    assert (V.shape, mu.shape) == ((12, rank), (rank,))
    assert_close(V.T @ V, torch.eye(rank).double(), 1e-12)
    assert (mu >= 0).all() and (mu.diff() <= 0).all()
    rest = A - V @ torch.diag(mu) @ V.T
    assert torch.linalg.eigvalsh(rest).min() > -1e-10
    if rank >= of:
        assert rest.abs().max() < 1e-10


@given(st.integers(1, 40), st.sampled_from([1.0, 1e-3, 1e3]), st.integers(0, 2**16))
def test_vectors_are_orthonormal_to_the_rounding_of_float32(rank: int, scale: float, seed: int) -> None:
    A = (scale * spectrum(200, torch.logspace(1, -6, 30).double(), seed)).float()
    V, mu = nystrom(lambda v: A @ v, 200, rank, generator(seed), A)
    assert V.dtype == mu.dtype == torch.float32
    V, mu = V.double(), mu.double()
    assert (V.T @ V - torch.eye(rank)).abs().max() < 1e-7
    assert torch.linalg.eigvalsh(A.double() - V @ torch.diag(mu) @ V.T).min() > -2e-5 * scale


# --- the inverse ---


@given(st.integers(10, SIZE), st.integers(0, 2**16), st.sampled_from([1e-3, GAMMA, 10.0]))
def test_it_is_the_damped_inverse_from_the_rank_of_the_fisher_on(rank: int, seed: int, damping: float) -> None:
    op, exact = operator(damping=damping, seed=seed)
    assert torch.linalg.matrix_rank(reference.fisher(mlp(), data(5, seed)[0], "categorical"), atol=1e-9) <= 10
    Q = op.inverse(rank=rank, generator=generator(seed))
    assert_close(Q.dense(), exact, 1e-8)
    assert (Q.damping, Q.shapes, Q.names) == (damping, op.shapes, op.names)


@given(st.integers(1, SIZE), st.integers(0, 2**16), st.sampled_from([1e-4, GAMMA]))
def test_it_is_positive_definite_and_above_the_inverse(rank: int, seed: int, damping: float) -> None:
    op, exact = operator(12, damping=damping)
    Q = op.inverse(rank, generator=generator(seed))
    values = torch.linalg.eigvalsh(Q.dense())
    assert values.min() > 0 and values.max() < (1 + 1e-9) / damping
    assert torch.linalg.eigvalsh(Q.dense() - exact).min() > -1e-9 / damping


def test_a_greater_rank_comes_nearer() -> None:
    op, exact = operator(12)
    errors = [float((op.inverse(r, generator=generator(0)).dense() - exact).norm() / exact.norm()) for r in (2, 8, 16)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2] > 0.01


@given(st.integers(1, SIZE), st.integers(0, 2**16))
def test_every_query_is_that_of_the_matrix(rank: int, seed: int) -> None:
    op = operator(12)[0].inverse(rank, generator=generator(seed))
    Q = op.dense()
    v, w = randn(SIZE, seed=seed), randn(SIZE, 3, seed=seed + 1)
    assert_close(op @ v, Q @ v, 1e-12)
    assert_close(op @ w, Q @ w, 1e-12)
    assert_close(op.flatten(op @ op.unflatten(v)), Q @ v, 1e-12)
    assert_close(op.quadratic(v), v @ Q @ v, 1e-12)
    assert_close(op.flatten(op.diagonal()), Q.diagonal(), 1e-11)
    assert_close(op.trace(), Q.trace(), 1e-11)
    assert_close(op.logdet(), torch.logdet(Q), 1e-9)
    assert_close(torch.as_tensor(op.to_scipy() @ v.numpy()), Q @ v, 1e-12)
    assert_close(op.to(dtype=torch.float32).dense(), Q, 1e-5)


def test_the_covariance_of_samples_converges_to_it() -> None:
    op = operator(12)[0].inverse(8)
    drawn, Q = op.sample(generator(1), 100_000), op.dense()
    rows = torch.cat([drawn[k].flatten(1) for k in op.names], 1)
    expected = math.sqrt((1 + float(Q.trace() ** 2 / Q.square().sum())) / 100_000)
    assert float((rows.T @ rows / 100_000 - Q).norm() / Q.norm()) < 2 * expected


def test_it_is_reproducible_and_leaves_model_and_global_stream_alone() -> None:
    model, (x, _) = mlp(), data()
    op = ff.FisherOperator(model, CATEGORICAL, [(x, None)], damping=GAMMA)
    before = snapshot(model)
    one, same, other = op.inverse(4, generator=generator(1)), op.inverse(4, generator=generator(1)), op.inverse(4)
    assert_same(before, snapshot(model))
    assert torch.equal(one.dense(), same.dense()) and not torch.equal(one.dense(), other.dense())


def test_some_parameters_only_in_several_batches_that_are_not_kept() -> None:
    model, (x, _) = mlp(), data()
    arguments: dict[str, Any] = {"damping": GAMMA, "include": "2", "keep": False}
    op = ff.FisherOperator(model, CATEGORICAL, [(x[:5], None), (x[5:], None)], **arguments)
    assert_close(op.inverse(15).dense(), torch.linalg.inv(op.dense()), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters(dtype: torch.dtype) -> None:
    model, (x, _) = mlp().to(dtype), data()
    op = ff.FisherOperator(model, CATEGORICAL, [(x.to(dtype), None)], damping=1e-3)
    Q = op.inverse(SIZE)
    assert Q.dtype == torch.float32
    wide = mlp().to(dtype).double()
    F = reference.fisher(wide, x.to(dtype).double(), "categorical")
    assert_close(Q.dense(), reference.damped_inverse(F, 1e-3), 1e-3 if dtype == torch.float32 else 0.2)
    assert torch.linalg.eigvalsh(Q.dense().double()).min() > 0


def test_it_stays_positive_definite_in_float32_where_the_damping_is_small() -> None:
    op = ff.FisherOperator(mlp().float(), CATEGORICAL, [(data()[0].float(), None)], damping=1e-6)
    Q = op.inverse(8, generator=generator(0))
    spiked = Q.q["joint"]
    assert isinstance(spiked, Spiked)
    assert (Q.quadratic(spiked.V) > 0).all() and (Q.quadratic(torch.eye(SIZE)) > 0).all()


# --- saving ---


def test_a_saved_inverse_is_read_back_at_its_rank() -> None:
    op, file = operator(12)[0].inverse(6), io.BytesIO()
    torch.save(op.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    read = ff.InverseFisher.for_model(mlp(), "joint", rank=6)
    assert torch.equal(read.dense(), torch.eye(SIZE).double())
    read.load_state_dict(state)
    assert torch.equal(read.dense(), op.dense()) and read.damping == GAMMA
    other = ff.InverseFisher.for_model(mlp(), "joint", rank=5)
    with pytest.raises(ValueError, match=r"joint.V: \(31, 6\) instead of \(31, 5\)"):
        other.load_state_dict(state)
    assert torch.equal(other.dense(), torch.eye(SIZE).double())


# --- what it is good for ---


def test_as_preconditioner_it_saves_two_thirds_of_the_iterations() -> None:
    model = filled(nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5)))
    op = ff.FisherOperator(model, CATEGORICAL, [(randn(40, 10), None)], damping=1e-3)
    b, Q = randn(op.shape[0], seed=1), op.inverse(rank=60, generator=generator(0))
    plain, preconditioned = op.solve(b), op.solve(b, preconditioner=Q)
    assert plain.converged and preconditioned.converged
    assert 3 * preconditioned.iterations <= plain.iterations
    assert_close(preconditioned.x, torch.linalg.solve(op.dense(), b), 1e-3)


def test_posterior_influence_and_penalty_are_those_of_the_exact_inverse() -> None:
    model, (x, y) = mlp(), data()
    op, exact = operator(12)
    Q = op.inverse(24)
    F = torch.linalg.inv(exact) - GAMMA * torch.eye(SIZE).double()
    posterior = ff.Laplace(model, CATEGORICAL, Q, [(x, y)])
    J = reference.jacobian(model, x).view(12, 3, -1)
    assert_close(posterior.outputs(x).covariance, J @ exact @ J.mT / 12, 1e-8)
    other = posterior.with_prior_precision(0.1).inverse
    assert_close(other.dense(), reference.damped_inverse(F, 0.1 / 12), 1e-6)
    assert isinstance(other.q["joint"], Spiked)
    best = posterior.tuned()
    for factor in (0.9, 1.1):
        near = posterior.with_prior_precision(best.prior_precision * factor)
        assert near.log_marginal_likelihood() < best.log_marginal_likelihood()
    probabilities = model(x).softmax(-1).detach()
    g = torch.einsum("nc,ncp->np", probabilities - nn.functional.one_hot(y, 3), J)
    assert_close(ff.influence_scores(model, CATEGORICAL, Q, [(x, y)], [(x, y)]), g @ exact @ g.T, 1e-8)
    penalty, d = ff.QuadraticPenalty(model, Q), randn(SIZE, seed=9)
    for name, step in Q.unflatten(d).items():
        model.get_parameter(name).data.add_(step)
    assert_close(penalty(), d @ F @ d / 2, 1e-6)


@pytest.mark.parametrize("rank", [3, SIZE])
def test_another_function_of_the_eigenvalues_keeps_the_vectors(rank: int) -> None:
    model, (x, y) = mlp(), data()
    posterior = ff.Laplace(model, CATEGORICAL, operator(12)[0].inverse(rank), [(x, y)])
    values, vectors = torch.linalg.eigh(posterior.inverse.dense())
    curvature = (1 / values - GAMMA).clamp(min=0)
    expected = vectors @ torch.diag(1 / (curvature + 0.5)) @ vectors.T
    assert_close(posterior.with_prior_precision(6.0).inverse.dense(), expected, 1e-6)


# --- errors: value, requirement, remedy ---


def test_wrong_arguments_are_refused() -> None:
    op = operator()[0]
    for rank, message in [(0, "rank=0 must be an integer >= 1"), (32, "rank=32 must be <= 31, the number of param")]:
        with pytest.raises(ValueError, match=message):
            op.inverse(rank)
        with pytest.raises(ValueError, match=message):
            ff.InverseFisher.for_model(mlp(), "joint", rank=rank)
    with pytest.raises(ValueError, match=r"damping=0\.0 must be > 0 to invert: F is singular; use a small value"):
        ff.FisherOperator(mlp(), CATEGORICAL, [(data()[0], None)]).inverse(3)
    with pytest.raises(ValueError, match="rank=3 must be None for q='kfac'; use q='joint'"):
        ff.InverseFisher.for_model(mlp(), rank=3)
    with pytest.raises(ValueError, match=r"needs a 4970 x 4970 matrix.*use 'kfac', or FisherOperator"):
        ff.InverseFisher.for_model(nn.Linear(70, 70), "joint")
    with pytest.raises(ValueError, match="q='spiked' must be one of"):
        ff.fishlegify(mlp(), CATEGORICAL, q="spiked")
