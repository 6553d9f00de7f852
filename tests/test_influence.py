"""Influence against dense matrices, and against training without the example."""

from typing import Any

import pytest
import torch
from after import CATEGORICAL, GAMMA, data, exact, mlp
from cases import LIKELIHOODS, SIGMA, assert_close, assert_same, filled, generator, randn, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff
from fishleg_func import examplewise, reference


def gradient(model: nn.Module, x: Tensor, y: Tensor, likelihood: str = "categorical") -> Tensor:
    """Gradient of the sum over terms, flat."""
    outputs = model(x)
    terms = outputs.numel() // outputs.shape[-1] if likelihood == "categorical" else len(outputs)
    loss = terms * reference.negative_log_likelihood(outputs, y, likelihood, sigma=SIGMA)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
def test_scores_are_gradients_around_q(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examplewise, "_ENTRIES", 2 * 31)  # two examples at a time
    model, (x, y), (xt, yt) = mlp(), data(), data(5, seed=7)
    if likelihood != "categorical":
        y, yt = (LIKELIHOODS[likelihood].sample(model(a).detach(), generator(1)) for a in (x, xt))
    Q = exact(model, reference.fisher(model, x, likelihood, sigma=SIGMA))
    G = torch.stack([gradient(model, x[i : i + 1], y[i : i + 1], likelihood) for i in range(12)])
    T = torch.stack([gradient(model, xt[i : i + 1], yt[i : i + 1], likelihood) for i in range(5)])
    train = DataLoader(TensorDataset(x, y), 5)
    before = snapshot(model)
    S = ff.influence_scores(model, LIKELIHOODS[likelihood], Q, train, [(xt, yt)])
    assert_close(S, T @ Q.dense() @ G.T, 1e-9)
    own = ff.self_influence(model, LIKELIHOODS[likelihood], Q, train)
    assert_close(own, (G @ Q.dense() @ G.T).diagonal(), 1e-9)
    assert_same(before, snapshot(model))


def test_an_example_is_the_sum_of_its_terms_and_masked_ones_are_none() -> None:
    model = filled(nn.Linear(3, 4))
    x, y = randn(3, 2, 3), torch.tensor([[0, 3], [1, -100], [-100, -100]])
    Q = ff.InverseFisher.for_model(model)
    own = ff.self_influence(model, CATEGORICAL, Q, [(x, y)])
    expected = [gradient(model, x[:1], y[:1]), gradient(model, x[1:2, :1], y[1:2, :1])]
    assert_close(own[:2], torch.stack(expected).square().sum(1), 1e-9)
    assert own[2] == 0


def test_inputs_by_keyword_and_output() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, a: Tensor, scale: float) -> dict[str, Tensor]:
            return {"logits": scale * self.layer(a)}

    model, (x, y) = Model().double(), data()
    Q = ff.InverseFisher.for_model(model)
    batches = [({"a": x, "scale": 2.0}, y)]
    own = ff.self_influence(model, CATEGORICAL, Q, batches, output=lambda out: out["logits"])
    assert_close(
        own,
        ff.self_influence(model.layer, CATEGORICAL, ff.InverseFisher.for_model(model.layer), [(2 * x, y)])
        * torch.ones(12),
        10,
    )
    assert own.shape == (12,)


def fit(x: Tensor, y: Tensor, damping: float, n: int) -> nn.Linear:
    """Softmax regression at its minimum: of the sum of losses over n, and the penalty."""
    model = nn.Linear(3, 3).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = damping / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / n + penalty
        loss.backward()
        return loss

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.reset_parameters()
    optimizer.step(closure)
    return model


def test_influence_predicts_what_training_without_an_example_does() -> None:
    (x, y), (xt, yt) = data(60), data(20, seed=7)
    model = fit(x, y, GAMMA, 60)

    def losses(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(xt), yt, reduction="none").detach()

    keep = [torch.arange(60) != i for i in range(60)]
    without = torch.stack([losses(fit(x[k], y[k], GAMMA, 60)) - losses(model) for k in keep], 1)
    Q = ff.estimate_inverse_fisher(
        model, CATEGORICAL, [(x, y)], damping=GAMMA, q="joint", updates=300, generator=generator(0)
    )
    S = ff.influence_scores(model, CATEGORICAL, Q, [(x, y)], [(xt, yt)])
    r = torch.corrcoef(torch.stack([S.flatten(), without.flatten()]))[0, 1]
    assert r > 0.98
    assert_close(S / 60, without, 0.2)


def test_wrong_arguments_are_refused() -> None:
    model, (x, y) = mlp(), data()
    Q = ff.InverseFisher.for_model(model)

    def scores(**given: Any) -> Tensor:
        arguments = {"inverse": Q, "train": [(x, y)], "test": [(x, y)]} | given
        return ff.influence_scores(model, CATEGORICAL, **arguments)

    shuffled = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    with pytest.raises(ValueError, match=r"train=.* shuffles, and must not"):
        scores(train=shuffled)
    with pytest.raises(ValueError, match=r"test=\[\] must yield at least one batch"):
        scores(test=[])
    with pytest.raises(TypeError, match="targets of type NoneType must be a tensor"):
        scores(train=[(x, None)])
    with pytest.raises(ValueError, match="the model lacks"):
        scores(inverse=ff.InverseFisher.for_model(nn.Linear(2, 2)))
