"""Q and the Fisher as linear operators: every query against the dense matrix of the oracle."""

import io
import math
from typing import Any

import pytest
import torch
from cases import CASES, LIKELIHOODS, SIGMA, assert_close, dense_q, filled, generator, randn, randomize_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff
from fishleg_func import reference

FAMILY_NAMES = ("kfac", "kronecker", "scaled_kronecker", "eigen", "diagonal", "dense", "joint")


def mlp() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def moved(model: nn.Module, q: str = "kfac", seed: int = 0) -> ff.FishLegStep:
    """A step whose Q is off its start."""
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(SIGMA), q=q, damping=0.1)
    randomize_(step, seed)
    return step


def joint_matrix(step: ff.FishLegStep) -> Tensor:
    L = step.q["joint"].get_parameter("L").detach()
    return L @ L.T


def matrix_of(step: ff.FishLegStep) -> Tensor:
    return joint_matrix(step) if "joint" in step.q else dense_q(step)


# --- Q: what a matrix is, for any model and family ---


@pytest.mark.parametrize("name", CASES)
def test_the_flat_order_is_that_of_the_oracle(name: str) -> None:
    model = CASES[name].model()
    step = moved(model)
    op = step.inverse_fisher()
    assert list(op.names) == reference.names(model) == [n for n, _ in model.named_parameters()]
    assert op.shapes == {n: p.shape for n, p in model.named_parameters()}
    assert_close(op.dense(), dense_q(step), 1e-12)


@given(st.sampled_from(FAMILY_NAMES), st.integers(0, 2**16))
def test_q_is_a_matrix(family: str, seed: int) -> None:
    step = moved(mlp(), family, seed)
    op, Q = step.inverse_fisher(), matrix_of(step)
    u, v, w = randn(Q.shape[0], seed=seed), randn(Q.shape[0], seed=seed + 1), randn(Q.shape[0], 3, seed=seed + 2)
    assert_close(op @ u, Q @ u, 1e-12)
    assert_close(op @ w, Q @ w, 1e-12)
    assert_close(op.flatten(op @ op.unflatten(u)), Q @ u, 1e-12)
    assert_close(op @ (2 * u - 3 * v), 2 * (op @ u) - 3 * (op @ v), 1e-12)  # linear
    assert_close(u @ (op @ v), v @ (op @ u), 1e-9)  # symmetric
    assert_close(op.quadratic(u), u @ Q @ u, 1e-12)
    assert_close(op.quadratic(op.unflatten(u)), u @ Q @ u, 1e-12)
    assert_close(op.quadratic(w), (w * (Q @ w)).sum(0), 1e-12)
    assert torch.linalg.eigvalsh(op.dense()).min() > 0  # positive definite
    assert torch.equal(op.dense(), op.dense().mT)
    assert_close(op.flatten(op.diagonal()), Q.diagonal(), 1e-12)
    assert_close(op.trace(), Q.trace(), 1e-12)
    assert_close(op.logdet(), torch.linalg.slogdet(Q).logabsdet, 1e-9)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_covariance_of_samples_converges_to_q(family: str) -> None:
    step = moved(mlp(), family)
    op, Q = step.inverse_fisher(), matrix_of(step)
    errors = []
    for n in (1_000, 100_000):
        drawn = op.sample(generator(1), n)
        assert {k: t.shape for k, t in drawn.items()} == {k: (n, *s) for k, s in op.shapes.items()}
        rows = torch.cat([drawn[k].reshape(n, -1) for k in op.names], 1)
        errors.append(float((rows.T @ rows / n - Q).norm() / Q.norm()))
    # E|C - Q|² = (|Q|² + (tr Q)²) / n for normal draws
    expected = math.sqrt((1 + float(Q.trace() ** 2 / Q.square().sum())) / 100_000)
    assert errors[1] < 2 * expected < errors[0]


def test_samples_are_reproducible_and_leave_the_global_stream_alone() -> None:
    op, before = moved(mlp()).inverse_fisher(), torch.get_rng_state()
    one, same, other = op.sample(generator(1)), op.sample(generator(1)), op.sample()
    assert {k: t.shape for k, t in one.items()} == op.shapes
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(op.flatten(other), op.flatten(op.sample()))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="n=0 must be an integer >= 1"):
        op.sample(n=0)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 4)])
@pytest.mark.parametrize("name", sorted(ff.families.FAMILIES))
def test_logdet_of_every_family_also_with_groups_and_padded_blocks(
    name: str, shape: tuple[int, ...], long: bool
) -> None:
    max_dim = math.prod(shape) if name == "dense" else 3 if long else 4096
    q = ff.families.FAMILIES[name](shape, max_dim=max_dim, dtype=torch.float64)
    for i in range(30):
        q.gather_(randn(*shape, seed=i))
    q.refresh_(torch.tensor(0.5, dtype=torch.float64))
    for i, (key, p) in enumerate(q.named_parameters()):
        start = p.detach().clone()  # padding stays where it starts, as in training
        inner = randn(*p.shape, seed=50 + i) * 0.2 if key == "s" or not long or name == "dense" else 0 * start
        p.data.add_(inner + (0.5 * start if key != "s" else 0))
    assert_close(q.logdet(), ff.QModule.logdet(q), 1e-9)


def test_the_operator_is_a_snapshot() -> None:
    x, y = randn(8, 3), randn(8, 2, seed=1)
    model = mlp()
    step = moved(model)
    op = step.inverse_fisher()
    before, parameters = op.dense(), {k: p.clone() for k, p in model.named_parameters()}
    step(x, y)
    assert not torch.equal(parameters["0.weight"], model.get_parameter("0.weight"))
    assert torch.equal(op.dense(), before)
    assert not torch.equal(step.inverse_fisher().dense(), before)
    assert op.damping == pytest.approx(0.1)


def test_the_natural_gradient_is_q_times_the_gradient() -> None:
    x, y, model = randn(8, 3), randn(8, 2, seed=1), mlp()
    step = moved(model)
    ff.likelihoods.Gaussian(SIGMA).nll(model(x), y).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    op = step.inverse_fisher()
    assert_close(op.flatten(step.natural_gradient(x, y)), op.flatten(op @ gradient), 1e-12)


def test_some_parameters_only() -> None:
    op = ff.fishlegify(mlp(), ff.likelihoods.Gaussian(), include="2").inverse_fisher()
    assert (op.names, op.shape) == (("2.weight", "2.bias"), (10, 10))


# --- moving and saving ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_operator_is_read_back(family: str) -> None:
    op, file = moved(mlp(), family).inverse_fisher(), io.BytesIO()
    torch.save(op.state_dict(), file)
    file.seek(0)
    read = ff.InverseFisher.for_model(mlp(), family)
    assert not torch.equal(read.dense(), op.dense())
    read.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(read.dense(), op.dense())
    assert torch.equal(read @ torch.ones(op.shape[0]), op @ torch.ones(op.shape[0]))
    assert read.damping == op.damping


def test_a_state_of_another_model_is_refused_and_nothing_changes() -> None:
    op, other = moved(mlp()).inverse_fisher(), ff.InverseFisher.for_model(nn.Linear(2, 2).double())
    before = op.dense()
    with pytest.raises(ValueError, match="lacks"):
        op.load_state_dict(other.state_dict())
    assert torch.equal(op.dense(), before)


def test_another_dtype() -> None:
    op = moved(mlp()).inverse_fisher()
    single = op.to(dtype=torch.float32)
    assert (single.dtype, op.dtype) == (torch.float32, torch.float64)
    assert single.dense().dtype == torch.float32
    assert_close(single.dense(), op.dense(), 1e-6)
    assert (single @ torch.ones(op.shape[0], dtype=torch.float64)).dtype == torch.float64  # that of the argument
    assert_close(op.to(device="cpu").dense(), op.dense(), 1e-15)


# --- the Fisher ---


def fisher_of(model: nn.Module, x: Tensor, likelihood: str, y: Tensor | None = None) -> Tensor:
    return reference.fisher(model, x, likelihood, sigma=SIGMA, targets=y)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical", "poisson"])
def test_the_fisher_of_unequal_batches_is_that_of_all_examples(likelihood: str, keep: bool) -> None:
    model, x = mlp(), randn(7, 3)
    batches = [(x[:4], None), (x[4:], None)]
    op = ff.FisherOperator(model, LIKELIHOODS[likelihood], batches, damping=0.3, keep=keep)
    F = fisher_of(model, x, likelihood)
    expected = F + 0.3 * torch.eye(len(F), dtype=torch.float64)
    v, w = randn(len(F)), randn(len(F), 2, seed=1)
    assert_close(op.dense(), expected, 1e-12)
    assert_close(op @ v, expected @ v, 1e-12)
    assert_close(op @ w, expected @ w, 1e-12)
    assert_close(op.flatten(op @ op.unflatten(v)), expected @ v, 1e-12)
    assert_close(op.quadratic(v), v @ expected @ v, 1e-12)


def test_masked_terms_do_not_count() -> None:
    model, x = mlp(), randn(6, 3)
    y = torch.tensor([0, -100, 1, -100, -100, -100])
    batches = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]  # of the last nothing is left
    op = ff.FisherOperator(model, ff.likelihoods.Categorical(), batches)
    assert_close(op.dense(), 2 * fisher_of(model, x[[0, 2]], "categorical") / 2, 1e-12)
    with pytest.raises(ValueError, match="at least one term"):
        ff.FisherOperator(model, ff.likelihoods.Categorical(), batches[2:])


def test_the_other_kinds() -> None:
    model, x, y = mlp(), randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    empirical = ff.FisherOperator(model, ff.likelihoods.Categorical(), [(x, y)], kind="empirical")
    assert_close(empirical.dense(), reference.score_fisher(model, x, y, "categorical"), 1e-12)
    sampled = [
        ff.FisherOperator(
            model, ff.likelihoods.Gaussian(SIGMA), [(x, None)], kind="sampled", keep=k, generator=generator(3)
        )
        for k in (True, False)
    ]
    assert_close(sampled[0].dense(), sampled[1].dense(), 1e-12)
    assert torch.linalg.matrix_rank(sampled[0].dense()) <= 5
    with pytest.raises(ValueError, match="targets=None must be given"):
        ff.FisherOperator(model, ff.likelihoods.Categorical(), [(x, None)], kind="empirical")


def test_dropout_has_one_mask_for_each_batch_and_the_global_stream_stays() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))).train()
    before = torch.get_rng_state()
    op = ff.FisherOperator(model, ff.likelihoods.Gaussian(), [(randn(4, 3), None)], keep=False)
    assert torch.equal(op.dense(), op.dense())
    assert torch.linalg.matrix_rank(op.dense()) > 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", [True, False])
def test_the_fisher_stays_while_the_model_is_trained(keep: bool) -> None:
    model, x, y = mlp(), randn(6, 3), randn(6, 2, seed=1)
    op = ff.FisherOperator(model, ff.likelihoods.Gaussian(SIGMA), DataLoader(TensorDataset(x, y), 4), keep=keep)
    before = op.dense()
    with ff.fishlegify(model, ff.likelihoods.Gaussian(SIGMA)) as step:
        step(x, y)
    assert_close(op.dense(), before, 1e-15)
    assert (fisher_of(model, x, "gaussian") - before).norm() > 1e-3 * before.norm()


# --- systems ---


@given(st.integers(0, 2**16), st.sampled_from([1e-3, 1e-1, 10.0]))
@settings(max_examples=10)
def test_solve_agrees_with_the_dense_inverse(seed: int, damping: float) -> None:
    model, x = mlp(), randn(6, 3, seed=seed)
    op = ff.FisherOperator(model, ff.likelihoods.Gaussian(SIGMA), [(x, None)], damping=damping)
    b = randn(op.shape[0], seed=seed + 1)
    expected = reference.damped_inverse(fisher_of(model, x, "gaussian"), damping) @ b
    flat = op.solve(b, tol=1e-10)
    assert_close(flat.x, expected, 1e-6)
    assert flat.converged and flat.residual <= 1e-10 and 0 < flat.iterations <= 2 * op.shape[0]
    assert_close(op.flatten(op.solve(op.unflatten(b), tol=1e-10).x), expected, 1e-6)
    preconditioned = op.solve(b, tol=1e-10, preconditioner=moved(model, seed=seed).inverse_fisher())
    assert preconditioned.converged
    assert_close(preconditioned.x, expected, 1e-6)


def test_the_exact_inverse_as_preconditioner_needs_one_iteration() -> None:
    model, x = mlp(), randn(6, 3)
    op = ff.FisherOperator(model, ff.likelihoods.Gaussian(SIGMA), [(x, None)], damping=0.1)
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(SIGMA), q="joint")
    step.q["joint"].get_parameter("L").data.copy_(torch.linalg.cholesky(torch.inverse(op.dense())))
    b = randn(op.shape[0])
    assert op.solve(b, tol=1e-8, preconditioner=step.inverse_fisher()).iterations == 1
    assert op.solve(b, tol=1e-8).iterations > 5


def test_what_does_not_converge_says_so_and_zero_is_solved_at_once() -> None:
    op = ff.FisherOperator(mlp(), ff.likelihoods.Gaussian(SIGMA), [(randn(6, 3), None)], damping=1e-3)
    b = randn(op.shape[0])
    cut = op.solve(b, tol=1e-10, max_iterations=2)
    assert (cut.iterations, cut.converged) == (2, False)
    assert cut.residual == pytest.approx(float((op @ cut.x - b).norm() / b.norm()))
    nothing = op.solve(0 * b)
    assert torch.equal(nothing.x, 0 * b)
    assert nothing[1:] == (0, 0.0, True)


# --- scipy ---


@pytest.mark.parametrize("which", ["q", "fisher"])
def test_scipy_solves_with_the_operators(which: str) -> None:
    sparse, np = pytest.importorskip("scipy.sparse.linalg"), pytest.importorskip("numpy")
    model = mlp()
    op: Any = moved(model).inverse_fisher()
    if which == "fisher":
        op = ff.FisherOperator(model, ff.likelihoods.Gaussian(SIGMA), [(randn(6, 3), None)], damping=0.1)
    A, dense, b = op.to_scipy(), op.dense().numpy(), randn(op.shape[0]).numpy()
    assert (A.shape, A.dtype) == (op.shape, np.float64)
    w = randn(op.shape[0], 3).numpy()
    for ours, theirs in [(A @ b, dense @ b), (A @ w, dense @ w), (A.T @ b, dense @ b), (A @ b[::-1], dense @ b[::-1])]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    x, info = sparse.cg(A, b, rtol=1e-10)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(dense, b), rtol=1e-6)


# --- errors: value, requirement, remedy ---


def test_wrong_vectors_are_refused() -> None:
    op = ff.InverseFisher.for_model(mlp(), damping=0.1)
    good = {name: torch.zeros(shape) for name, shape in op.shapes.items()}
    for bad, error, message in [
        (torch.zeros(3), ValueError, r"v of shape \(3,\) must be of shape \(26,\) or \(26, k\)"),
        (torch.zeros(26, dtype=torch.long), TypeError, "must be of a floating dtype"),
        (good | {"more": torch.zeros(1)}, ValueError, r"unknown \['more'\]"),
        ({k: good[k] for k in list(good)[1:]}, ValueError, r"lacks \['0.weight'\]"),
        (good | {"0.bias": torch.zeros(3)}, ValueError, r"0.bias: \(3,\) instead of \(4,\)"),
        (good | {"0.bias": torch.zeros(4).long()}, TypeError, "must be of a floating dtype"),
        (good | {"0.bias": 1.0}, TypeError, "must be a tensor"),
        ([1.0], TypeError, "must be a dict like the parameters"),
    ]:
        with pytest.raises(error, match=message):
            op @ bad


def test_wrong_arguments_are_refused() -> None:
    model, x, gaussian = mlp(), randn(4, 3), ff.likelihoods.Gaussian()
    for keywords, message in [({"damping": -1.0}, "damping=-1.0 must be >= 0"), ({"kind": "antithetic"}, "kind=")]:
        with pytest.raises(ValueError, match=message):
            ff.FisherOperator(model, gaussian, [(x, None)], **keywords)
    with pytest.raises(TypeError, match="must be a pair"):
        ff.FisherOperator(model, gaussian, [x])
    with pytest.raises(TypeError, match="targets of type list"):
        ff.FisherOperator(model, gaussian, [(x, [1])])
    with pytest.raises(ValueError, match="at least one term"):
        ff.FisherOperator(model, gaussian, [])
    op = ff.FisherOperator(model, gaussian, [(x, None)])
    with pytest.raises(ValueError, match=r"damping=0\.0 must be > 0 to solve"):
        op.solve(torch.ones(26))
    damped = ff.FisherOperator(model, gaussian, [(x, None)], damping=1.0)
    with pytest.raises(ValueError, match=r"v of shape \(26, 2\) must be of shape \(26,\)"):
        damped.solve(torch.ones(26, 2))
    with pytest.raises(ValueError, match="preconditioner about"):
        damped.solve(torch.ones(26), preconditioner=ff.InverseFisher.for_model(model, include="2"))


def test_a_large_matrix_is_refused() -> None:
    op = ff.InverseFisher.for_model(nn.Linear(100, 101))
    with pytest.raises(ValueError, match=r"dense\(\) of 10201 parameters must be of <= 10000; use products"):
        op.dense()


def test_representations_say_what_it_is() -> None:
    assert (
        repr(ff.InverseFisher.for_model(mlp(), damping=0.5))
        == "InverseFisher(shape=(26, 26), parameters=4, damping=0.5)"
    )


# --- the joint family ---


def test_joint_is_one_dense_block_and_trains() -> None:
    model, x, y = mlp(), randn(8, 3), randn(8, 2, seed=1)
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(SIGMA), q="joint", damping=1.0)
    assert {k: q.shape for k, q in step.q.items()} == {"joint": (1, 26)}
    losses = [float(step(x, y)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert {row.treatment for row in step.report().rows} == {"joint"}


def test_joint_is_of_the_widest_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).double())
    (q,) = ff.fishlegify(model, ff.likelihoods.Gaussian(), q="joint").q.values()
    assert {p.dtype for p in q.parameters()} == {torch.float64}
