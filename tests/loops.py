"""Training loops of the optimizer front end, and small models for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import generator, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.encoder(self.embedding(tokens))))
        return logits


def labels(*shape: int, seed: int = 0, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=generator(seed))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, lambda i: (randn(12, 4, seed=i), labels(12, seed=i))),
    "cnn": (cnn, lambda i: (randn(8, 1, 6, 6, seed=i), labels(8, seed=i))),
    "transformer": (Transformer, lambda i: (labels(6, 5, seed=i, classes=7), labels(6, 5, seed=i + 50, classes=7))),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def optimizer_of(model: nn.Module, likelihood: Any = None, **options: Any) -> ff.FishLeg:
    return ff.FishLeg(model, likelihood or Categorical(), generator=generator(3), **options)


def train(optimizer: Any, model: nn.Module, name: str, steps: range, **scale: float) -> list[float]:
    losses = []
    for i in steps:
        torch.manual_seed(i)
        x, y = MODELS[name][1](i)
        optimizer.zero_grad()
        loss = Categorical().nll(model(x), y)
        (scale.get("scale", 1.0) * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k]))] == []
