"""γ: fixed where it is given, and by default in the units of the loss, whose scale then does not matter."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import FAMILIES, LIKELIHOODS, filled, generator, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.likelihoods import Categorical, Gaussian
from fishleg_func.step import FishLegStep

RELATIVE = 0.03


def mlp() -> nn.Module:
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    return filled(nn.Sequential(*layers))


def trained(scale: float, steps: int, **settings: object) -> FishLegStep:
    """Train with the loss multiplied by ``scale``, through the standard deviation of the likelihood."""
    step = ff.fishlegify(mlp(), Gaussian(scale**-0.5), generator=generator(0), **settings)  # type: ignore[arg-type]
    for i in range(steps):
        step(randn(32, 6, seed=i), randn(32, 3, seed=100 + i))
    return step


def flat(step: FishLegStep) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3])
@pytest.mark.parametrize("q", ["kfac", "eigen", {"*": "embedding"}, {"*": "diagonal"}])
def test_by_default_the_scale_of_the_loss_does_not_matter(q: object, scale: float) -> None:
    one, other = (trained(s, 25, q=q) for s in (1.0, scale))
    torch.testing.assert_close(flat(other), flat(one), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.damping, one.damping * scale)


def test_with_a_given_damping_it_does() -> None:
    one, other = (trained(s, 25, damping=3e-3) for s in (1.0, 1e-3))
    assert (flat(other) - flat(one)).norm() > 0.01 * flat(one).norm()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_by_default_it_is_a_part_of_the_mean_fisher_of_the_outputs(name: str) -> None:
    model = filled(nn.Linear(6, 3))
    step = ff.fishlegify(model, LIKELIHOODS[name], generator=generator(0))
    x = randn(4000, 6)
    y = torch.zeros(4000, dtype=torch.int64) if name == "categorical" else torch.zeros(4000, 3).double()
    outputs = nn.Parameter(model(x).detach())

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outputs = nn.Parameter(outputs[:50])

        def forward(self, x: Tensor) -> Tensor:
            return self.outputs

    step(x[:50], y[:50])
    H = 50 * reference.fisher(Outputs(), x[:50], name, sigma=0.7)  # that of the mean over 50 terms
    tolerance = 1e-9 if name != "categorical" else 0.15  # its draws vary
    assert step.damping.item() == pytest.approx(RELATIVE * H.diagonal().mean().item(), rel=tolerance)


@pytest.mark.parametrize("q", FAMILIES.values())
def test_every_family_knows_it(q: str) -> None:
    step = trained(4.0, 1, q={"*": q})
    assert step.damping.item() == pytest.approx(4 * RELATIVE)


def test_masked_terms_do_not_count() -> None:
    x, y = randn(10, 6), torch.zeros(10, dtype=torch.int64)
    y[5:] = -100
    found = []
    for n in (5, 10):
        step = ff.fishlegify(filled(nn.Linear(6, 3)), Categorical(), generator=generator(0))
        step(x[:n], y[:n])
        found.append(step.damping.item())
    assert found[0] == pytest.approx(found[1], rel=1e-9) and all(0 < d < RELATIVE / 2 for d in found)


def test_a_given_damping_is_fixed_and_both_can_be_filled() -> None:
    step = trained(1.0, 3, damping=0.5)
    assert step.damping == 0.5 and step.hyper.relative_damping == 0
    step.hyper.damping.fill_(0.25)
    step.hyper.relative_damping.fill_(2.0)
    assert step.damping.item() == pytest.approx(2.25)


def test_it_is_part_of_the_state() -> None:
    step = trained(7.0, 12)
    other = ff.fishlegify(copy.deepcopy(step.model), Gaussian(7**-0.5))
    assert other.damping == RELATIVE  # nothing is known yet
    other.load_state_dict(step.state_dict())
    assert torch.equal(other.damping, step.damping)


@pytest.mark.parametrize("settings", [{"step_norm": None}, {"step_norm": "kl"}, {"momentum": "after"}, {}])
def test_outputs_without_variance_leave_q_bounded(settings: dict[str, object]) -> None:
    model = nn.Linear(6, 3)
    nn.init.constant_(model.bias, 0.0)
    model.bias.data[0] = 1e4  # p is one, to the last bit
    step = ff.fishlegify(model, Categorical(), **settings)  # type: ignore[arg-type]
    for _ in range(12):
        step(torch.randn(8, 6), torch.ones(8, dtype=torch.int64))
    assert step.damping == pytest.approx(RELATIVE)
    assert all((p - 1e4 * (p > 5e3)).abs().max() < 1e3 for p in model.parameters())


@pytest.mark.parametrize("settings", [{"step_norm": None}, {"step_norm": "kl"}, {"momentum": "after"}, {}])
def test_a_first_part_that_is_all_masked_leaves_q_bounded(settings: dict[str, object]) -> None:
    model = filled(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    step = ff.fishlegify(model, Categorical(), aux_batch_size=4, generator=generator(0), **settings)  # type: ignore[arg-type]
    for i in range(13):
        y = torch.arange(10) % 3
        y[:4] = -100 if i == 0 else y[:4]
        step(randn(10, 6, seed=i), y)
    assert all(p.abs().max() < 20 for p in model.parameters())
    assert all(p.abs().max() < 1e3 for p in step._direction.values())  # 1e13 where γ vanished


def test_it_falls_to_a_thousandth_of_what_it_was_at_most() -> None:
    step = trained(1.0, 1)
    step.load_state_dict(step.state_dict() | {"fisher.level": torch.tensor([0.0, 1.0]).double()})
    assert step.damping.item() == pytest.approx(1e-3 * RELATIVE)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_bad_values_are_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        ff.fishlegify(mlp(), Gaussian(), damping=damping)
