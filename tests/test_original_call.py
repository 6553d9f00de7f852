"""The calls of the original run after changing the import."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Bernoulli


def test_the_call_of_the_originals_readme_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(200, 4)
    y = torch.tanh(x @ torch.randn(4, 3))
    data = torch.utils.data.TensorDataset(x, y)
    aux_loader = torch.utils.data.DataLoader(data, shuffle=True, batch_size=50)
    likelihood = ff.FISH_LIKELIHOODS["FixedGaussian".lower()](sigma=1.0, device="cpu")
    with pytest.warns(UserWarning, match="eps has no effect"):
        optimizer = ff.FishLeg(
            model, likelihood, aux_loader, lr=0.02, eps=1e-4, beta=0.9, weight_decay=1e-5, update_aux_every=10,
            aux_lr=1e-3, aux_betas=(0.9, 0.999), aux_eps=1e-8, damping=0.3, pre_aux_training=25, sgd_lr=0.01,
            device="cpu",
        )  # fmt: skip
    losses = []
    for data_x, data_y in list(torch.utils.data.DataLoader(data, batch_size=50)) * 20:
        optimizer.zero_grad()
        loss = likelihood.nll(model(data_x), data_y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0


def test_the_call_with_draw_and_nll_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(60, 4), torch.rand(60, 3).round()
    likelihood = Bernoulli()

    def nll(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return likelihood.nll(model.forward(data[0]), data[1])

    def draw(model: nn.Module, data_x: Tensor) -> tuple[Tensor, Tensor]:
        return data_x, likelihood.sample(model.forward(data_x))

    optimizer = ff.FishLeg(model, draw, nll, [(x, y)], lr=0.3, damping=0.3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nll(model, (x, y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
