"""The quadratic penalty against dense matrices, and what it keeps."""

import pytest
import torch
from after import CATEGORICAL, GAMMA, data, exact, mlp
from cases import assert_close, filled, generator, randn, randomize_
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference


def shift_(model: nn.Module, seed: int = 3) -> Tensor:
    """Move the parameters, and return by how much."""
    before = reference.flat_parameters(model)
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.3 * randn(*p.shape, seed=seed + i))
    return reference.flat_parameters(model) - before


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_it_is_the_quadratic_form_of_the_fisher(weight: float) -> None:
    model, (x, _) = mlp(), data()
    F = reference.fisher(model, x, "categorical")
    penalty = ff.QuadraticPenalty(model, exact(model, F), weight=weight)
    assert penalty() == 0
    d = shift_(model)
    loss = penalty()
    assert_close(loss, weight / 2 * d @ F @ d, 1e-6)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert_close(gradient, weight * F @ d, 1e-6)


@pytest.mark.parametrize("family", ["kfac", "kronecker", "scaled_kronecker", "eigen", "diagonal", "dense", "joint"])
def test_every_family_is_inverted_without_its_damping(family: str) -> None:
    model = mlp()
    step = ff.fishlegify(model, CATEGORICAL, q=family, damping=GAMMA)
    randomize_(step)
    op = step.inverse_fisher()
    step.remove()
    values, vectors = torch.linalg.eigh(op.dense())
    precision = vectors @ torch.diag((1 / values - GAMMA).clamp(min=0)) @ vectors.T
    penalty = ff.QuadraticPenalty(model, op)
    d = shift_(model)
    assert_close(penalty(), d @ precision @ d / 2, 1e-6)


def test_directions_without_curvature_are_free() -> None:
    model = filled(nn.Linear(3, 2))
    x = randn(8, 3)
    x[:, 2] = 0  # a pixel that is always dark
    Q = exact(model, reference.fisher(model, x, "gaussian"))
    penalty = ff.QuadraticPenalty(model, Q)
    model.get_parameter("weight").data[:, 2] += 5
    assert penalty() < 1e-9
    model.get_parameter("weight").data[:, 1] += 1
    assert penalty() > 0.1


def test_it_keeps_an_earlier_task_that_plain_training_forgets() -> None:
    (x, y), (x2, y2) = data(60), data(60, seed=20)
    y, y2 = (x[:, 0] > 0).long(), (x2[:, 1] > 0).long()
    x[:, 1:], x2[:, 0], x2[:, 2] = 0.1 * x[:, 1:], 0.1 * x2[:, 0], 1  # tasks that one network can do both

    def train(model: nn.Module, x: Tensor, y: Tensor, penalty: ff.QuadraticPenalty | None = None) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
        return float(nn.functional.cross_entropy(model(x), y).detach())

    model, plain = mlp(), mlp()
    train(model, x, y)
    plain.load_state_dict(model.state_dict())
    before = loss(model, x, y)
    Q = ff.estimate_inverse_fisher(
        model, CATEGORICAL, [(x, y)], damping=1e-3, q="joint", updates=200, generator=generator(0)
    )
    penalty = ff.QuadraticPenalty(model, Q)
    train(plain, x2, y2)
    train(model, x2, y2, penalty)
    assert loss(model, x, y) - before < 0.5 * (loss(plain, x, y) - before)
    assert loss(model, x2, y2) < 0.5


def test_steps_of_fishleg_see_it() -> None:
    (x, y), left = data(), []
    for weight in (0.0, 100.0):
        model = mlp()
        Q = exact(model, reference.fisher(model, x, "categorical"))
        penalty, measure = ff.QuadraticPenalty(model, Q, weight=weight), ff.QuadraticPenalty(model, Q)
        optimizer = ff.FishLeg(model, CATEGORICAL, lr=0.02, generator=generator(0))
        for _ in range(20):
            optimizer.zero_grad()
            (CATEGORICAL.nll(model(x), y) + penalty()).backward()
            optimizer.step()
        optimizer.remove()
        left.append(float(measure().detach()))
    assert 0 < left[1] < 0.1 * left[0]


def test_wrong_arguments_are_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"weight=-1.0 must be >= 0"):
        ff.QuadraticPenalty(model, ff.InverseFisher.for_model(model), weight=-1.0)
    with pytest.raises(ValueError, match="the model lacks"):
        ff.QuadraticPenalty(nn.Linear(2, 2), ff.InverseFisher.for_model(model))
