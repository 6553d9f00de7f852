"""λ that learns no scale, where steps have a norm by layer: the shape of Q alone."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, lam_of, randn
from test_auxiliary import learner
from test_reference import draw

from fishleg_func import reference
from fishleg_func.step import FishLegStep


def scaled(step: FishLegStep, factor: float) -> FishLegStep:
    for q in step.q.values():
        q.scale_(factor)
    return step


def test_where_steps_have_a_norm_by_layer_the_scale_of_q_is_not_learned() -> None:
    before, factor = {}, 50.0
    for size in (1.0, factor):
        step, x, y = learner("mlp", "categorical", "kfac", step_norm="layer")
        old = lam_of(scaled(step, size))
        step.update_aux(x, y)
        before[size] = {
            (name, k): old[name][k].inverse() @ new[k] for name, new in lam_of(step).items() for k in ("L",)
        }
    for key, moved in before[1.0].items():
        assert_close(before[factor][key], moved, 1e-8)  # L is moved by the same relative change
        assert (moved - torch.eye(len(moved))).abs().max() > 1e-3


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_surrogate_without_scale_has_the_gradient_of_the_auxiliary_loss_at_its_best_scale(family: str) -> None:
    lam, basis = draw(family, 3, 2)
    leaves = [value.requires_grad_() for value in lam.values()]
    root, u, q = randn(6, 6, seed=5), randn(6, seed=6), reference.dense_q(family, lam, basis, shape=(3, 2))
    damped = root @ root.T + 0.1 * torch.eye(6)
    v = q @ u
    least = -((u @ v) ** 2) / (v @ damped @ v) / 2  # of A over all multiples of Q
    best = ((u @ v) / (v @ damped @ v)).detach()
    actual = reference.surrogate(root @ root.T, 0.1, q, u, False, [torch.arange(6)])
    slopes = [torch.autograd.grad(value, leaves, retain_graph=True) for value in (best * actual, least)]
    torch.testing.assert_close(*slopes)
    assert abs(actual.item()) < 1e-10


def test_surrogate_without_scale_moves_nothing_where_no_multiple_is_best() -> None:
    fisher = torch.tensor([[1.0, -5.0], [-5.0, 26.0]]).double()
    q, u = torch.eye(2).double().requires_grad_(), torch.tensor([1.0, 1.0]).double()
    value = reference.surrogate(fisher, 0.0, q, u, False, [torch.tensor([0]), torch.tensor([1])])
    assert torch.equal(torch.autograd.grad(value, q)[0][0], torch.zeros(2).double())  # (F u)_0 = -4
