"""λ learns the damped inverse of a known, ill-conditioned Fisher to three percent, by matrix products alone.

Settings, found by a sweep of the rates 0.2 to 0.5, each constant or moved geometrically to 0.2, 0.4 or 0.5:
``aux_rule="relative"``, ``aux_lr=0.4`` held constant, ``u="gaussian"``, one fixed batch, start at the identity.
All of the rates from 0.2 to 0.5 reach one percent in 300 updates; 0.4 is about the best, and needs no decay.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import generator, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.step import FishLegStep

UPDATES, BOUND = 200, 0.03
DAMPING = 1e-3


def inputs(n: int, seed: int, condition: float = 100.0) -> Tensor:
    """Return 2n examples whose E[xxᵀ] has geometric eigenvalues around one, in a random basis."""
    rows, _ = torch.linalg.qr(randn(2 * n, n, seed=seed))
    basis, _ = torch.linalg.qr(randn(n, n, seed=seed + 1))
    edge = math.log10(condition) / 2
    return math.sqrt(2 * n) * (rows * torch.logspace(-edge, edge, n, dtype=torch.float64).sqrt()) @ basis.T


def learner(sigma: float | Tensor, outputs: int, seed: int, **options: object) -> FishLegStep:
    model = nn.Linear(20, outputs, bias=False, dtype=torch.float64)
    settings = {"u": "gaussian", "aux_rule": "relative", "aux_lr": 0.4, "damping": DAMPING} | options
    return ff.fishlegify(model, ff.likelihoods.Gaussian(sigma), generator=generator(seed), **settings)  # type: ignore[arg-type]


def learned(step: FishLegStep, x: Tensor, inverse: Tensor, updates: int = UPDATES) -> tuple[float, float]:
    """Return the relative error of Q, in Frobenius norm, before and after the updates."""
    y = randn(len(x), step.model.out_features, seed=7)  # type: ignore[arg-type]
    module = step.q["(root)"]

    def error() -> float:
        return ((module.dense() - inverse).norm() / inverse.norm()).item()

    start = error()
    for _ in range(updates):
        step.update_aux(x, y)
    return start, error()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dense_learns_the_inverse(seed: int) -> None:
    x = inputs(20, seed)
    step = learner(1.0, 1, seed, q="dense")
    F = reference.fisher(step.model, x, "gaussian")
    assert torch.linalg.cond(F).item() == pytest.approx(100, rel=1e-6)
    start, end = learned(step, x, reference.damped_inverse(F, DAMPING))
    assert start > 0.5 and end <= BOUND, f"from {start:.3f} to {end:.4f}"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kronecker_learns_a_kronecker_inverse(seed: int) -> None:
    """Give each of four outputs its σ: F = diag(σ⁻²) ⊗ E[xxᵀ], whose damped inverse is nearly a Kronecker product."""
    x, sigma = inputs(20, seed), torch.logspace(-0.3, 0.3, 4, dtype=torch.float64)
    F = torch.kron(torch.diag(sigma**-2), x.T @ x / len(x))
    step = learner(sigma, 4, seed, q="kronecker")
    start, end = learned(step, x, reference.damped_inverse(F, DAMPING))
    assert start > 0.5 and end <= BOUND, f"from {start:.3f} to {end:.4f}"


@pytest.mark.parametrize("family", ["dense", "kronecker"])
def test_the_checks_notice_a_rule_that_does_nothing(family: str) -> None:
    x, step = inputs(20, 0), learner(1.0, 1, 0, q=family)
    step._curvature.rule = lambda probe, q, ok: None
    start, end = learned(step, x, reference.damped_inverse(x.T @ x / len(x), DAMPING), updates=3)
    assert start == end > BOUND
