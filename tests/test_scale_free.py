"""λ that learns no scale from gradients, where steps have a norm by layer: the shape of Q alone."""

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


def relative_moves(family: str, factor: float) -> dict[str, torch.Tensor]:
    """What L is multiplied by in an update, by block, where Q is scaled by a factor."""
    step, x, y = learner("mlp", "categorical", family, step_norm="layer", u="gradient")
    old = lam_of(scaled(step, factor))
    step.update_aux(x, y)
    return {name: old[name]["L"].inverse() @ new["L"] for name, new in lam_of(step).items()}


def test_where_steps_have_a_norm_by_layer_the_scale_of_q_is_not_learned() -> None:
    other = relative_moves("kfac", 50.0)
    for name, moved in relative_moves("kfac", 1.0).items():
        assert_close(other[name], moved, 1e-8)  # the same relative change
        assert (moved - torch.eye(len(moved))).abs().max() > 1e-3


def test_a_family_without_a_basis_learns_the_scale_whatever_the_norm_of_steps() -> None:
    for name, large in relative_moves("kronecker", 50.0).items():
        assert torch.linalg.eigvalsh((large + large.mT) / 2).min() < 0.9  # far too large a Q shrinks along the gradient
        small = relative_moves("kronecker", 0.02)[name]
        assert torch.linalg.eigvalsh((small + small.mT) / 2).max() > 1.1  # far too small a one grows


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
