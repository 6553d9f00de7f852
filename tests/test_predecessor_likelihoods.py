"""One test for each defect of the original's likelihoods, and of what its README shows of them, named by its number."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_predecessor_modules import X, Y, mlp, values
from test_transform import LABELS, randn
from torch import nn

import fishleg_func as ff
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian


def test_d60_categorical_takes_labels_and_refuses_one_hot() -> None:
    logits, labels = randn(3, 3), torch.tensor([2, 0, 1])  # as many examples as classes
    torch.testing.assert_close(Categorical().nll(logits, labels), F.cross_entropy(logits, labels))
    for one_hot in (torch.eye(3)[labels], torch.eye(3)[labels].long()):
        with pytest.raises((TypeError, ValueError), match="Categorical"):
            ff.fishlegify(nn.Linear(4, 3), Categorical())(randn(3, 4), one_hot)


def test_d61_classes_are_the_last_dimension_of_sequences() -> None:
    logits, labels = randn(2, 5, 3), torch.arange(10).view(2, 5) % 3
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(Categorical().nll(logits, labels), expected)
    model = nn.Linear(4, 3)
    expected = F.cross_entropy(model(randn(2, 5, 4)).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ff.fishlegify(model)(randn(2, 5, 4), labels), expected.detach())


def test_d62_sigma_is_learned_where_it_is_said_to_be() -> None:
    x, w = randn(400, 4).double(), randn(3, 4, seed=1).double()
    y = x @ w.T + 0.3 * randn(400, 3, seed=2)
    assert Gaussian().tensors() == {}
    likelihood = Gaussian(learn_sigma=True)
    (log_sigma,) = likelihood.tensors().values()
    optimizer = torch.optim.Adam([log_sigma], lr=0.1)
    for _ in range(100):  # a parameter like any other: with an optimizer, and with the step of its own
        optimizer.zero_grad()
        likelihood.nll(x @ w.T, y).backward()
        optimizer.step()
    assert abs(likelihood.sigma.item() - 0.3) < 0.02  # type: ignore[union-attr]
    for _ in range(50):
        likelihood.learn_(x @ w.T, y, torch.tensor(0.5).double())
    root_mean_square = (y - x @ w.T).square().mean().sqrt()
    torch.testing.assert_close(
        torch.as_tensor(likelihood.sigma).double(), root_mean_square.view(1), rtol=1e-5, atol=0.0
    )


def test_d63_sigma_may_be_a_vector() -> None:
    sigma, f = torch.tensor([0.5, 1.0, 2.0]), torch.zeros(20_000, 3)
    drawn = Gaussian(sigma).sample(f, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.std(0), sigma, rtol=0.05, atol=0.0)
    expected = -torch.distributions.Normal(f, sigma).log_prob(drawn).sum(1).mean()
    torch.testing.assert_close(Gaussian(sigma).nll(f, drawn), expected)
    model = nn.Linear(4, 3)
    ff.fishlegify(model, Gaussian(sigma))(X.float(), Y.float())


def test_d64_bernoulli_takes_logits_and_says_so() -> None:
    logits, y = randn(5, 2), (randn(5, 2, seed=1) > 0).float()
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(y).sum(1).mean()
    torch.testing.assert_close(Bernoulli().nll(logits, y), expected)
    assert "logits" in (Bernoulli.__doc__ or "") and "probit" not in (Bernoulli.__doc__ or "")
    assert math.isclose(float(Bernoulli().sample(torch.full((4000, 1), 1.0)).mean()), 0.731, abs_tol=0.03)


@pytest.mark.parametrize(
    ("likelihood", "hole"),
    [(Gaussian(ignore_value=math.nan), math.nan), (Bernoulli(ignore_value=-1), -1.0)],
    ids=["gaussian", "bernoulli"],
)
def test_d65_masked_elements_do_not_count(likelihood: Any, hole: float) -> None:
    model, targets = mlp(), (Y > 0).double()
    targets[8:] = hole
    likelihood_of_all, v = likelihood.nll(model(X), targets), {k: torch.ones_like(p) for k, p in values(model).items()}
    torch.testing.assert_close(likelihood_of_all, likelihood.nll(model(X[:8]), targets[:8]))
    masked = ff.fisher_vector_product(model, likelihood, X, v, targets=targets)
    torch.testing.assert_close(masked, ff.fisher_vector_product(model, likelihood, X[:8], v, targets=targets[:8]))


def test_d65_classes_have_weights() -> None:
    weight, logits = torch.tensor([1.0, 0.0, 2.0]), randn(12, 3)
    torch.testing.assert_close(Categorical(weight=weight).nll(logits, LABELS), F.cross_entropy(logits, LABELS, weight))


def test_d65_masked_positions_do_not_count() -> None:
    labels = LABELS.clone()
    labels[8:] = -100
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    losses = []
    for m, x, y in ((model, X, labels), (twin, X[:8], LABELS[:8])):
        step = ff.fishlegify(m, Categorical())
        losses.append(torch.stack([step(x, y) for _ in range(3)]))
        assert step.natural_gradient(x, y)["0.weight"].isfinite().all()
    torch.testing.assert_close(losses[0][0], losses[1][0])
    v = {k: torch.ones_like(p) for k, p in values(model).items()}
    masked = ff.fisher_vector_product(model, Categorical(), X, v, targets=labels)
    torch.testing.assert_close(masked, ff.fisher_vector_product(model, Categorical(), X[:8], v, targets=LABELS[:8]))


def test_d67_the_likelihood_of_the_readme_is_there() -> None:
    device = torch.device("cpu")
    likelihood = ff.FISH_LIKELIHOODS["FixedGaussian".lower()](sigma=1.0, device=device)
    pred_y, data_y = randn(5, 2), randn(5, 2, seed=1)
    torch.testing.assert_close(
        likelihood.nll(data_y, pred_y), Gaussian(1.0).nll(pred_y, data_y)
    )  # its order, symmetric
    assert likelihood.draw(pred_y).shape == (5, 2)  # type: ignore[attr-defined]
