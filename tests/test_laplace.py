"""The posterior against dense matrices in float64: covariance, predictions, evidence, other priors, samples."""

import math
from typing import Any

import pytest
import torch
from after import CATEGORICAL, GAMMA, data, exact, mlp
from cases import LIKELIHOODS, SIGMA, assert_close, assert_same, filled, generator, randn, randomize_, snapshot
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import examplewise, reference

FAMILY_NAMES = ("kfac", "kronecker", "scaled_kronecker", "eigen", "diagonal", "dense", "joint")


def posterior(likelihood: str = "categorical", damping: float = GAMMA) -> tuple[nn.Module, Tensor, ff.Laplace]:
    """The model, the precision N F + τ I, and a posterior whose Q is exact."""
    model, (x, y) = mlp(), data()
    F = reference.fisher(model, x, likelihood, sigma=SIGMA)
    batches: Any = [(x[:5], y[:5]), (x[5:], y[5:])]
    if likelihood != "categorical":
        batches = [(a, LIKELIHOODS[likelihood].sample(model(a).detach(), generator(1))) for a, _ in batches]
    found = ff.Laplace(model, LIKELIHOODS[likelihood], exact(model, F, damping), batches)
    return model, 12 * (F + damping * torch.eye(len(F)).double()), found


def test_the_factor_of_the_data_and_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examplewise, "_ENTRIES", 3 * 3 * 31)  # three examples at a time
    model, precision, found = posterior()
    assert (found.terms, found.prior_precision) == (pytest.approx(12), pytest.approx(12 * GAMMA))
    x = randn(4, 3, seed=5)
    moments = found.outputs(x)
    J = reference.jacobian(model, x).view(4, 3, -1)
    assert_close(moments.covariance, J @ torch.linalg.inv(precision) @ J.mT, 1e-9)
    assert_close(moments.mean, model(x).detach(), 1e-12)


def test_masked_terms_are_no_data() -> None:
    model, (x, y) = mlp(), data()
    Q = ff.InverseFisher.for_model(model, damping=GAMMA)
    y[[0, 4, 7]] = -100
    masked = ff.Laplace(model, CATEGORICAL, Q, [(x[:6], y[:6]), (x[6:], y[6:])])
    kept = ff.Laplace(model, CATEGORICAL, Q, [(x[y >= 0], y[y >= 0])])
    assert masked.terms == pytest.approx(9)
    assert_close(masked.log_marginal_likelihood(), kept.log_marginal_likelihood(), 1e-9)
    with pytest.raises(ValueError, match="at least one term"):
        ff.Laplace(model, CATEGORICAL, Q, [(x[:1], y[:1])])


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli", "poisson"])
def test_the_closed_form_of_predictions_agrees_with_samples_of_the_linearized_model(likelihood: str) -> None:
    model, _, found = posterior(likelihood, damping=1.0)
    x = randn(4, 3, seed=5)
    f, v = model(x).detach(), found.outputs(x).covariance.diagonal(dim1=1, dim2=2)
    probit = f / (1 + math.pi * v / 8).sqrt()
    expected = {
        "gaussian": f, "categorical": probit.softmax(-1), "bernoulli": probit.sigmoid(), "poisson": (f + v / 2).exp()
    }  # fmt: skip
    closed = found.predict(x)
    assert_close(closed, expected[likelihood], 1e-9)
    linear = found.predict(x, method="linear", samples=20_000, generator=generator(1))
    assert_close(linear, closed, 0.02)
    if likelihood in ("bernoulli", "poisson"):  # the variance matters
        plain = {"bernoulli": f.sigmoid(), "poisson": f.exp()}[likelihood]
        assert (linear - closed).norm() < 0.5 * (plain - closed).norm()


def test_sampled_networks_have_the_posterior_s_moments() -> None:
    model = filled(nn.Linear(3, 2))  # linear in its parameters: sampled networks are what the linearized one says
    x, y = randn(12, 3), randn(12, 2, seed=1)
    F = reference.fisher(model, x, "gaussian", sigma=SIGMA)
    found = ff.Laplace(model, ff.likelihoods.Gaussian(SIGMA), exact(model, F), [(x, y)])
    new = randn(4, 3, seed=5)
    linear, sampled = found.outputs(new), found.outputs(new, samples=4000, generator=generator(1))
    assert_close(sampled.mean, linear.mean, 0.02)
    assert_close(sampled.covariance, linear.covariance, 0.1)
    assert_close(found.predict(new, method="network", samples=4000, generator=generator(1)), sampled.mean, 1e-12)
    drawn = found.sample(3, generator(2))
    assert {name: t.shape for name, t in drawn.items()} == {"weight": (3, 2, 3), "bias": (3, 2)}
    assert not torch.equal(found.sample()["weight"], found.sample()["weight"])


def test_the_marginal_likelihood() -> None:
    model, precision, found = posterior()
    (x, y), tau = data(), 12 * GAMMA
    theta = reference.flat_parameters(model)
    expected = (
        -12 * reference.negative_log_likelihood(model(x), y, "categorical")
        - tau / 2 * theta.square().sum()
        + len(theta) / 2 * math.log(tau)
        - torch.logdet(precision) / 2
    )
    assert_close(found.log_marginal_likelihood(), expected, 1e-9)


def test_another_prior() -> None:
    _, precision, found = posterior()
    F = precision / 12 - GAMMA * torch.eye(len(precision)).double()
    for factor in (0.1, 30.0):
        other = found.with_prior_precision(12 * GAMMA * factor)
        assert_close(other.inverse.dense(), reference.damped_inverse(F, GAMMA * factor), 1e-6)
        assert other.prior_precision == pytest.approx(12 * GAMMA * factor)
    assert_close(found.inverse.dense(), reference.damped_inverse(F, GAMMA), 1e-9)


def test_the_tuned_prior_has_the_greatest_marginal_likelihood() -> None:
    _, _, found = posterior()
    tuned = found.tuned()
    best = tuned.prior_precision
    assert abs(math.log(best / found.prior_precision)) > 0.1
    highest = tuned.log_marginal_likelihood()
    for factor in (0.5, 0.95, 1.05, 2.0):
        assert found.with_prior_precision(best * factor).log_marginal_likelihood() < highest


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_keeps_its_eigenvectors(family: str) -> None:
    model = filled(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 2)))
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(), q=family, damping=0.01)
    randomize_(step)
    found = ff.Laplace(
        model, ff.likelihoods.Gaussian(), step.inverse_fisher(), [(torch.tensor([[0, 1], [2, 4]]), randn(2, 2))]
    )
    values, vectors = torch.linalg.eigh(found.inverse.dense())
    curvature = (1 / values - 0.01).clamp(min=0)
    expected = vectors @ torch.diag(1 / (curvature + 0.5)) @ vectors.T
    other = found.with_prior_precision(1.0)  # N = 2
    assert_close(other.inverse.dense(), expected, 1e-6)
    assert other.inverse.damping == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["kfac", "dense"])
def test_groups_keep_their_eigenvectors(family: str) -> None:
    model = filled(nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 2)))
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(), q=family, damping=0.01)
    randomize_(step)
    found = ff.Laplace(model, ff.likelihoods.Gaussian(), step.inverse_fisher(), [(randn(2, 2, 2, 2), randn(2, 2))])
    values, vectors = torch.linalg.eigh(found.inverse.dense())
    expected = vectors @ torch.diag(1 / ((1 / values - 0.01).clamp(min=0) + 0.5)) @ vectors.T
    assert_close(found.with_prior_precision(1.0).inverse.dense(), expected, 1e-6)


def test_long_sides_by_matrix_and_large_ones_not() -> None:
    def split(shape: tuple[int, ...], **kind: Any) -> ff.QModule:
        return ff.families.KFAC(shape, max_dim=3, **kind)

    model = filled(nn.Linear(6, 4))
    found = ff.Laplace(
        model,
        ff.likelihoods.Gaussian(),
        ff.InverseFisher.for_model(model, split, damping=1.0),
        [(randn(2, 6), randn(2, 4))],
    )
    assert_close(found.with_prior_precision(4.0).inverse.dense(), torch.eye(28).double() / 2, 1e-9)
    model = nn.Linear(80, 60)
    found = ff.Laplace(
        model, ff.likelihoods.Gaussian(), ff.InverseFisher.for_model(model, split, damping=1.0),
        [(torch.ones(2, 80), torch.ones(2, 60))],
    )  # fmt: skip
    with pytest.raises(ValueError, match="of 4860 entries, a KFAC, must be of <= 4096"):
        found.tuned()


def test_some_parameters_only_and_the_model_is_left_alone() -> None:
    model, (x, y) = mlp(), data()
    model.get_parameter("0.weight").grad = torch.ones(4, 3).double()
    Q = ff.InverseFisher.for_model(model, include="2", damping=GAMMA)
    before = snapshot(model)
    found = ff.Laplace(model, CATEGORICAL, Q, [(x, y)])
    found.outputs(x), found.outputs(x, samples=2), found.predict(x, method="linear"), found.predict(x, method="network")
    assert_same(before, snapshot(model))
    J = reference.jacobian(model, x).view(12, 3, -1)[..., 16:]
    assert_close(found.outputs(x).covariance, J @ J.mT / 12, 1e-9)
    before_training = found.outputs(x)
    with torch.no_grad():
        model.get_parameter("2.weight").add_(1.0)
    assert torch.equal(found.outputs(x).mean, before_training.mean)


def test_other_dtypes() -> None:
    (x, y), wide = data(), mlp()
    Q = exact(wide, reference.fisher(wide, x, "categorical"))
    expected = ff.Laplace(wide, CATEGORICAL, Q, [(x, y)]).outputs(x).covariance
    for dtype, tolerance in [(torch.float32, 1e-4), (torch.bfloat16, 0.1)]:
        model, inputs = mlp().to(dtype), x.to(dtype)
        found = ff.Laplace(model, CATEGORICAL, Q, [(inputs, y)])
        assert_close(found.outputs(inputs).covariance, expected, tolerance)
        for method in ("linear", "network"):
            assert_close(found.predict(inputs, method=method).sum(1), torch.ones(12), 1e-2)
        assert found.sample()["0.weight"].dtype == dtype


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)])
def test_examples_must_not_depend_on_each_other_or_on_chance(layer: nn.Module) -> None:
    model, (x, y) = filled(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3))).train(), data()
    Q = ff.InverseFisher.for_model(model, damping=GAMMA)
    with pytest.raises(ValueError, match=r"modules \['1'\] in train mode"):
        ff.Laplace(model, CATEGORICAL, Q, [(x, y)])
    assert ff.Laplace(model.eval(), CATEGORICAL, Q, [(x, y)]).predict(x).shape == (12, 3)


def test_wrong_arguments_are_refused() -> None:
    model, (x, y) = mlp(), data()
    Q = ff.InverseFisher.for_model(model, damping=GAMMA)
    with pytest.raises(ValueError, match=r"damping=0.0 must be > 0"):
        ff.Laplace(model, CATEGORICAL, ff.InverseFisher.for_model(model), [(x, y)])
    with pytest.raises(ValueError, match=r"the model lacks \['0.weight', '0.bias', '2.weight'\]"):
        ff.Laplace(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double(), CATEGORICAL, Q, [(x, y)])
    found = ff.Laplace(model, CATEGORICAL, Q, [(x, y)])
    with pytest.raises(ValueError, match="method='bridge'"):
        found.predict(x, method="bridge")
    with pytest.raises(ValueError, match="samples=1 must be an integer >= 2"):
        found.outputs(x, samples=1)
    with pytest.raises(ValueError, match=r"prior_precision=0.0 must be > 0"):
        found.with_prior_precision(0.0)

    class Other(ff.likelihoods.Gaussian):
        pass

    class Own(ff.likelihoods.Likelihood):
        nll = ff.likelihoods.Gaussian().nll
        sample = ff.likelihoods.Gaussian().sample

    assert ff.Laplace(model, Other(), Q, [(x, randn(12, 3))]).predict(x).shape == (12, 3)
    with pytest.raises(ValueError, match="must be Gaussian, Bernoulli, Categorical or Poisson"):
        ff.Laplace(model, Own(), Q, [(x, randn(12, 3))]).predict(x)
