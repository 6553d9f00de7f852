"""Gaussian with learned sigma: gradient, Fisher block and step, against autograd, draws and closed forms."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_likelihoods import close, randn, within_five_standard_errors
from torch import Tensor

from fishleg_func.likelihoods import Bernoulli, Gaussian, Likelihood

SIGMAS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
ONE = torch.tensor(1.0, dtype=torch.float64)
SHAPES = {
    "number": (0.7, (5, 3)),
    "per-output": (SIGMAS, (5, 3)),
    "one-dimension": (0.7, (5,)),
    "broadcast": (SIGMAS[:2].view(2, 1), (5, 2, 3)),
    "with-batch-axis": (SIGMAS.view(1, 3), (5, 3)),
}
every_shape = pytest.mark.parametrize(("sigma", "shape"), SHAPES.values(), ids=SHAPES)


def learned(sigma: Any, **options: Any) -> Gaussian:
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return Gaussian(sigma, learn_sigma=True, **options)


def log_sigma(likelihood: Likelihood) -> Tensor:
    return likelihood.tensors()["log_sigma"]


@every_shape
def test_the_gradient_reaches_log_sigma(sigma: Any, shape: tuple[int, ...]) -> None:
    likelihood, f, y = learned(sigma), randn(*shape), randn(*shape, seed=1)
    loss = likelihood.nll(f, y)
    loss.backward()
    s = log_sigma(likelihood)
    assert s.is_leaf and s.requires_grad and s.ndim >= 1 and s.grad is not None
    log = s.detach().clone().requires_grad_()
    elements = ((y - f) / log.exp()).square() / 2 + log.expand(shape) + math.log(2 * math.pi) / 2
    expected = elements.sum() / shape[0]
    close(loss.detach(), expected.detach())
    close(s.grad, torch.autograd.grad(expected, log)[0])
    close(loss.detach(), Gaussian(torch.as_tensor(sigma, dtype=torch.float64)).nll(f, y))


@every_shape
@pytest.mark.parametrize("rate", [1.0, 0.03])
def test_a_step_is_autograd_s_gradient_over_the_fisher_clipped(sigma: Any, shape: tuple[int, ...], rate: float) -> None:
    for scale in (1.0, 10.0):  # of the residuals: the second is clipped
        likelihood, f = learned(sigma), randn(*shape)
        y = f + scale * randn(*shape, seed=1)
        s = log_sigma(likelihood).detach().clone()
        (gradient,) = torch.autograd.grad(likelihood.nll(f, y), log_sigma(likelihood))
        per_entry = f[0].numel() / s.numel()
        likelihood.learn_(f, y, rate * ONE)
        close(log_sigma(likelihood).detach(), s - rate * (gradient / (2 * per_entry)).clamp(-1, 1))
        assert (gradient / (2 * per_entry)).abs().max() > 1 or scale == 1


@every_shape
def test_both_steps_are_one_formula(sigma: Any, shape: tuple[int, ...]) -> None:
    step, front, f, y = learned(sigma), learned(sigma), randn(*shape), randn(*shape, seed=1)
    for _ in range(3):
        step.learn_(f, y, 0.3 * ONE)
        log_sigma(front).grad = None
        front.nll(f, y).backward()
        front.learn_from_gradient_(f, 0.3 * ONE)
    close(log_sigma(step), log_sigma(front))
    before = log_sigma(front).detach().clone()
    log_sigma(front).grad = None
    front.learn_from_gradient_(f, 0.3 * ONE)  # no backward pass, no step
    assert torch.equal(log_sigma(front).detach(), before)


def test_the_fisher_of_log_sigma_is_two_per_element() -> None:
    likelihood, f = learned(SIGMAS), randn(1, 3)
    draws = []
    for seed in range(4000):
        y = likelihood.sample(f, torch.Generator().manual_seed(seed))
        draws.append(torch.autograd.grad(likelihood.nll(f, y), log_sigma(likelihood))[0])
    scores = torch.stack(draws)
    assert within_five_standard_errors(scores, torch.zeros(3))
    assert within_five_standard_errors(scores[:, :, None] * scores[:, None, :], 2 * torch.eye(3).double())


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_sigma_converges_to_the_residual(start: float) -> None:
    f = randn(400, 3)
    y = f + SIGMAS * randn(400, 3, seed=1)
    shared, own = learned(start), learned(torch.full((3,), start))
    for likelihood in (shared, own):
        for _ in range(200):
            likelihood.learn_(f, y, 0.3 * ONE)
    close(torch.as_tensor(own.sigma), (y - f).square().mean(0).sqrt(), 1e-9)
    close(torch.as_tensor(shared.sigma), (y - f).square().mean().sqrt().view(1), 1e-9)
    assert ((torch.as_tensor(own.sigma) / SIGMAS - 1).abs() < 0.1).all()


def test_masked_elements_do_not_count() -> None:
    f, y = randn(6, 3), randn(6, 3, seed=1)
    kept = torch.ones(6, 3, dtype=torch.bool)
    kept[4:] = kept[0, 1] = False
    holes = torch.where(kept, y, math.nan)
    likelihood, s = learned(SIGMAS, ignore_value=math.nan), SIGMAS.log()
    (gradient,) = torch.autograd.grad(likelihood.nll(f, holes), log_sigma(likelihood))
    excess = torch.where(kept, 1 - ((y - f) / SIGMAS).square(), 0)
    close(gradient, excess.sum(0) / 4)  # four examples have an element
    expected = s - 0.1 * (excess.sum(0) / kept.sum(0) / 2).clamp(-1, 1)
    likelihood.learn_(f, holes, 0.1 * ONE)
    close(log_sigma(likelihood).detach(), expected)
    front = learned(SIGMAS, ignore_value=math.nan)
    front.nll(f, holes).backward()
    front.learn_from_gradient_(f, 0.1 * ONE, front.weight(f, holes))
    close(log_sigma(front).detach(), expected)
    column = torch.where(torch.tensor([False, True, True]), y, math.nan)
    before = log_sigma(front).detach().clone()
    front.learn_(f, column, ONE)
    assert log_sigma(front)[0] == before[0] and (log_sigma(front)[1:] != before[1:]).all()


def test_nothing_moves_where_ok_is_false() -> None:
    likelihood, f, y = learned(SIGMAS), randn(5, 3), randn(5, 3, seed=1)
    likelihood.learn_(f, y, ONE, torch.tensor(False))
    close(log_sigma(likelihood).detach(), SIGMAS.log(), 0.0)
    likelihood.learn_(f, y * math.nan, ONE, torch.tensor(False))
    close(log_sigma(likelihood).detach(), SIGMAS.log(), 0.0)
    likelihood.learn_(f, y, ONE, torch.tensor(True))
    assert (log_sigma(likelihood).detach() != SIGMAS.log()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_step_is_the_eager_one(dtype: torch.dtype) -> None:
    f, y, rate = randn(5, 3).to(dtype), randn(5, 3, seed=1).to(dtype), torch.tensor(0.3, dtype=dtype)

    def step(likelihood: Gaussian, ok: Tensor | None) -> Tensor:
        gradient: Callable[..., tuple[Tensor, Tensor]] = torch.func.grad_and_value(likelihood.nll)
        cotangent, _ = gradient(f, y)
        likelihood.learn_(f, y, rate, ok)
        return cotangent

    with torch.no_grad():
        for sigma in (torch.tensor(0.7, dtype=dtype), SIGMAS.to(dtype)):
            for ok in (None, torch.tensor(True), torch.tensor(False)):
                eager, traced = Gaussian(sigma, learn_sigma=True), Gaussian(sigma, learn_sigma=True)
                compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
                for _ in range(3):
                    torch.testing.assert_close(compiled(traced, ok), step(eager, ok))
                torch.testing.assert_close(log_sigma(traced), log_sigma(eager))
                assert torch.equal(log_sigma(eager).exp(), sigma.log().exp().view(-1)) == (ok is not None and not ok)


def test_curvature_and_samples_follow_sigma_without_a_graph() -> None:
    likelihood, f, y = learned(SIGMAS), randn(5, 3), randn(5, 3, seed=1)
    likelihood.learn_(f, y, ONE)
    sigma = torch.as_tensor(likelihood.sigma)
    assert not torch.allclose(sigma, SIGMAS) and not sigma.requires_grad
    fixed = Gaussian(sigma)
    for actual, expected in (
        (likelihood.fisher(f, y), fixed.fisher(f, y)),
        (likelihood.sample(f, torch.Generator().manual_seed(0)), fixed.sample(f, torch.Generator().manual_seed(0))),
    ):
        assert not actual.requires_grad
        close(actual, expected)


def test_outputs_of_another_dtype() -> None:
    likelihood = Gaussian(2.0, learn_sigma=True)
    assert log_sigma(likelihood).dtype == torch.float32 and Gaussian(2.0).tensors() == {}
    assert log_sigma(Gaussian(torch.tensor(2), learn_sigma=True)).dtype == torch.float32
    assert log_sigma(Gaussian(torch.tensor(2.0).bfloat16(), learn_sigma=True)).dtype == torch.float32
    f = randn(4, 3)
    assert likelihood.nll(f, f).dtype == torch.float64
    likelihood.learn_(f, f, ONE)
    close(torch.as_tensor(likelihood.sigma), 2 * torch.tensor([math.exp(-0.5)]), 1e-6)


def test_one_sigma_per_example_cannot_be_learned() -> None:
    f, per_example = torch.zeros(4, 3), torch.ones(4, 1)
    Gaussian(per_example).check_shapes(f, f)
    with pytest.raises(ValueError, match=r"sigma of shape \(4, 1\) has one entry per example.*; give one per output"):
        Gaussian(per_example, learn_sigma=True).check_shapes(f, f)
    for fits in (torch.ones(3), torch.ones(1, 3), torch.ones(1, 1), 1.0):
        Gaussian(fits, learn_sigma=True).check_shapes(f, f)
    with pytest.raises(ValueError, match=r"sigma of shape \(2,\) must broadcast"):
        Gaussian(torch.ones(2), learn_sigma=True).check_shapes(f, f)


def test_others_have_nothing_to_learn() -> None:
    f, y = torch.zeros(2, 3), torch.ones(2, 3)
    for likelihood in (Gaussian(), Bernoulli()):
        before = copy.deepcopy(vars(likelihood))
        likelihood.learn_(f, y, torch.tensor(1.0))
        likelihood.learn_from_gradient_(f, torch.tensor(1.0))
        assert likelihood.tensors() == {} and vars(likelihood) == before


def test_a_copy_has_a_sigma_of_its_own() -> None:
    likelihood, f, y = learned(SIGMAS), randn(5, 3), randn(5, 3, seed=1)
    twin = copy.deepcopy(likelihood)
    likelihood.learn_(f, y, ONE)
    close(log_sigma(twin).detach(), SIGMAS.log())
    with torch.no_grad():
        log_sigma(twin).copy_(log_sigma(likelihood))
    close(twin.nll(f, y), likelihood.nll(f, y))
    assert "learn_sigma=True" in repr(twin) and "learn_sigma" not in repr(Gaussian())
