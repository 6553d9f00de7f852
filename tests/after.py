"""What the tests of posteriors, influence and penalties share: a small classifier and exact inverses."""

from __future__ import annotations

import torch
from cases import filled, generator, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference

CATEGORICAL = ff.likelihoods.Categorical()
GAMMA = 0.05


def mlp() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def data(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, 3, seed=seed), torch.randint(3, (n,), generator=generator(seed + 1))


def exact(model: nn.Module, fisher: Tensor, damping: float = GAMMA) -> ff.InverseFisher:
    """Q that is the inverse itself."""
    op = ff.InverseFisher.for_model(model, "joint", damping=damping)
    op.load_state_dict(
        {"joint.L": torch.linalg.cholesky(reference.damped_inverse(fisher, damping)), "damping": damping}
    )
    return op
