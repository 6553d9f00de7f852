"""FISH_LIKELIHOODS: the original's names, arguments and order of arguments, and the values of its formulas."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_likelihoods import close, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import FISH_LIKELIHOODS
from fishleg_func.likelihoods import Categorical, Gaussian

NAMES = ["fixedgaussian", "gaussian", "bernoulli", "softmax", "poisson"]
LABELS = torch.tensor([2, 0, 1])


def test_names_in_any_case() -> None:
    assert list(FISH_LIKELIHOODS) == NAMES and len(FISH_LIKELIHOODS) == 5
    assert FISH_LIKELIHOODS["FixedGaussian"] is FISH_LIKELIHOODS["FixedGaussian".lower()]
    assert "SoftMax" in FISH_LIKELIHOODS and "probit" not in FISH_LIKELIHOODS and 1 not in FISH_LIKELIHOODS
    assert FISH_LIKELIHOODS.get("laplace") is None and "softmax" in repr(FISH_LIKELIHOODS)
    with pytest.raises(KeyError, match="likelihood 'laplace' must be one of 'fixedgaussian', 'gaussian'"):
        FISH_LIKELIHOODS["laplace"]


@pytest.mark.parametrize("name", NAMES)
def test_each_takes_a_device_draws_and_is_called(name: str) -> None:
    likelihood: Any = FISH_LIKELIHOODS[name](device="cpu")
    f = randn(3, 3)
    torch.manual_seed(0)
    y = likelihood.draw(f)
    torch.manual_seed(0)
    assert torch.equal(y, likelihood.sample(f))
    close(likelihood(f, y), likelihood.nll(f, y))
    model = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    step = ff.fishlegify(model, likelihood)
    targets = likelihood.sample(model(x).detach())
    assert all(step(x, targets).isfinite() for _ in range(3))
    assert isinstance(likelihood, ff.likelihoods.Likelihood)


def test_values_are_those_of_the_original_s_formulas() -> None:
    f, y, sigma = randn(3, 4), randn(3, 4, seed=1), 0.7
    original = (math.log(sigma**2) + ((y - f) / sigma) ** 2).sum() / (2 * 3)
    constant = 4 * math.log(2 * math.pi) / 2  # which the original leaves out
    for name in ("fixedgaussian", "gaussian"):
        close(FISH_LIKELIHOODS[name](sigma=torch.tensor(sigma, dtype=torch.float64)).nll(f, y), original + constant)
    binary = (y > 0).double()
    close(FISH_LIKELIHOODS["bernoulli"]().nll(f, binary), (f * (1 - binary) + F.softplus(-f)).sum() / 3)
    one_hot = F.one_hot(LABELS, 4)
    close(FISH_LIKELIHOODS["softmax"]().nll(f, one_hot), -(f.log_softmax(1) * one_hot).sum(1).mean())


def test_sigma_is_learned_only_where_the_name_says_so() -> None:
    sigma = torch.tensor([0.5, 2.0])
    fixed, learned = (FISH_LIKELIHOODS[name](sigma=sigma, device="cpu") for name in ("fixedgaussian", "gaussian"))
    assert fixed.tensors() == {}
    torch.testing.assert_close(learned.tensors()["log_sigma"].detach(), sigma.log())
    assert isinstance(learned, Gaussian) and learned.tensors()["log_sigma"].requires_grad
    assert FISH_LIKELIHOODS["fixedgaussian"](sigma=1.0).sigma == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_softmax_takes_labels_and_one_hot(dtype: torch.dtype) -> None:
    likelihood, f, t = FISH_LIKELIHOODS["softmax"](), randn(3, 3), randn(3, 3, seed=1)  # as many examples as classes
    one_hot = F.one_hot(LABELS, 3).to(dtype)
    close(likelihood.nll(f, one_hot), Categorical().nll(f, LABELS))
    close(likelihood.nll(f, LABELS), Categorical().nll(f, LABELS))
    close(likelihood.weight(f, one_hot), Categorical().weight(f, LABELS))
    close(likelihood.weight(f), Categorical().weight(f))
    assert torch.equal(likelihood.masked(LABELS, one_hot), LABELS)
    close(likelihood.fisher(f, t), Categorical().fisher(f, t))
    sequences, labels = randn(2, 5, 3), torch.arange(10).view(2, 5) % 3
    close(likelihood.nll(sequences, F.one_hot(labels, 3)), Categorical().nll(sequences, labels))
    masked = labels.where(labels != 1, -100)
    close(likelihood.nll(sequences, masked), Categorical().nll(sequences, masked))
    assert torch.equal(likelihood.masked(labels, masked), masked)
    losses = []
    for targets in (LABELS, one_hot):
        torch.manual_seed(0)
        step = ff.fishlegify(nn.Linear(3, 3).double(), likelihood, fisher="empirical")
        losses.append(torch.stack([step(f, targets) for _ in range(3)]))
    close(*losses)


SWAPPED: list[tuple[str, Tensor, Tensor]] = [
    ("bernoulli", torch.tensor([[-3.0, 2.0]]), torch.tensor([[0.0, 1.0]])),
    ("poisson", torch.tensor([[-3.0, 2.0]]), torch.tensor([[0.0, 4.0]])),
    ("softmax", torch.tensor([[-3.0, 2.0]]), torch.tensor([[0.0, 1.0]])),
    ("softmax", torch.tensor([[-3.0, 2.0]]), torch.tensor([1])),
    ("bernoulli", torch.tensor([[0.5]], requires_grad=True), torch.tensor([[1.0]])),
    ("poisson", torch.tensor([[0.5]], requires_grad=True), torch.tensor([[1.0]])),
]


@pytest.mark.parametrize(("name", "outputs", "targets"), SWAPPED)
def test_swapped_arguments_raise(name: str, outputs: Tensor, targets: Tensor) -> None:
    likelihood = FISH_LIKELIHOODS[name]()
    assert likelihood.nll(outputs, targets).isfinite()
    with pytest.raises((ValueError, TypeError), match=r"order must be nll|order is nll|must be integer class labels"):
        likelihood.nll(targets, outputs)


def test_swapped_arguments_of_a_gaussian_are_the_same_thing() -> None:
    f, y = randn(4, 2).requires_grad_(), randn(4, 2, seed=1)
    for name in ("fixedgaussian", "gaussian"):
        likelihood = FISH_LIKELIHOODS[name](sigma=1.0)
        ours, theirs = (torch.autograd.grad(likelihood.nll(*pair), f)[0] for pair in ((f, y), (y, f)))
        close(ours, theirs)


def test_mixed_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets in \[0.5, 0.5\] of shape \(1, 2\).* must be one-hot"):
        FISH_LIKELIHOODS["softmax"]().nll(torch.zeros(1, 2), torch.full((1, 2), 0.5))
    with pytest.raises(ValueError, match="must be one-hot"):
        FISH_LIKELIHOODS["softmax"]().nll(torch.zeros(1, 2), torch.ones(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_they_compile(name: str) -> None:
    likelihood, f = FISH_LIKELIHOODS[name](), randn(4, 3).float()
    y = likelihood.sample(f)
    compiled = torch.compile(likelihood.nll, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(f, y), likelihood.nll(f, y))
