"""The momentum without a copy of its own: m = Q⁻¹ p is what a pair (m, p) keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, LIKELIHOODS, assert_close, randn, targets_for
from torch import nn

import fishleg_func as ff
from fishleg_func._opaque import LONG
from fishleg_func.momentum import Momentum
from fishleg_func.step import FishLegStep

MAX_DIM = 5


def pair_of_steps(model: nn.Module, likelihood: ff.likelihoods.Likelihood) -> tuple[FishLegStep, FishLegStep]:
    """Return a step that keeps no m, and one that does."""
    alone, paired = (ff.fishlegify(m, likelihood) for m in (model, copy.deepcopy(model)))
    paired._averages = Momentum(paired._curvature, "nesterov", paired=True)
    paired._direction = paired._averages.p
    assert paired._averages.m.keys() == paired.q.keys()
    return alone, paired


@pytest.mark.parametrize("case", ["mlp", "cnn", "sequence", "embedding"])
def test_training_without_m_is_training_with_it(case: str) -> None:
    model = CASES[case].model()
    alone, paired = pair_of_steps(model, LIKELIHOODS["gaussian"])
    kept = {k for k, q in alone.q.items() if type(q) is not ff.families.KFAC}
    assert alone._averages.m.keys() == kept != set(alone.q)
    for i in range(45):  # eight refreshes
        x = CASES[case].inputs(12, seed=i)
        y = targets_for(alone.model, x, "gaussian", seed=i)
        alone(x, y)
        paired(x, y)
        if i % 9 == 8:  # and outside of the schedule, by whoever
            for step in (alone, paired):
                step.update_aux(x, y)
                next(iter(step.q.values())).scale_(1.5)
    for name, p in alone.model.named_parameters():
        assert_close(p, paired.model.get_parameter(name), 1e-7, name)
    for k, m in alone._averages.momentum().items():
        assert_close(m, paired._averages.m[k], 1e-6, k)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (7, 6), (2, 7, 6), (LONG, LONG + 3)])
@pytest.mark.parametrize("max_dim", [MAX_DIM, 4096])
def test_q_is_undone(shape: tuple[int, ...], max_dim: int) -> None:
    """Undo Q of one matrix or several, with whole sides and with blocks that do not divide them."""
    q = ff.families.KFAC(shape, max_dim=max_dim, dtype=torch.float64)
    for i in range(4):
        q.gather_(randn(*shape, seed=i))
    q.refresh_(torch.tensor(0.1, dtype=torch.float64))
    q.L.add_(0.1 * randn(*q.L.shape, seed=5) / q.L.shape[-1])
    m = randn(*shape, seed=9)
    v = q.act(q.operator(), m)
    assert isinstance(v, torch.Tensor)
    assert_close(q.unact(q.operator(), v), m, 1e-9)


def test_where_q_is_singular_to_rounding_its_part_of_m_is_dropped_and_no_other() -> None:
    q = ff.families.KFAC((1, 3))
    q.L.copy_(torch.diag(torch.tensor([1.0, 1e-12, 0.5])))
    m = torch.tensor([[2.0, 3.0, 4.0]])
    v = q.act(q.operator(), m)
    assert isinstance(v, torch.Tensor)
    undone = q.unact(q.operator(), v)
    assert_close(undone, torch.tensor([[2.0, 0.0, 4.0]]), 1e-5)
    assert_close(q.act(q.operator(), undone), v, 1e-5)  # and Q does not see it


def test_what_keeps_m() -> None:
    model, likelihood = nn.Linear(3, 2), ff.likelihoods.Gaussian()
    for settings in ({}, {"u": "gaussian"}, {"update_aux_every": 0}):
        assert not ff.fishlegify(copy.deepcopy(model), likelihood, **settings)._averages.m
    rest = ({"update_aux_every": 5}, {"u": "momentum"}, {"step_norm": "kl"}, {"q": "eigen"}, {"q": "kronecker"})
    for settings in rest:
        assert ff.fishlegify(copy.deepcopy(model), likelihood, **settings)._averages.m


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_a_direction_in_float32_is_that_of_float64_after_refreshes(condition: float) -> None:
    """Train on inputs whose second moments differ by the square of ``condition``: K is inverted at each refresh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))
    scales = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 40)
    alone, _ = pair_of_steps(copy.deepcopy(model), ff.likelihoods.Gaussian())
    _, paired = pair_of_steps(copy.deepcopy(model).double(), ff.likelihoods.Gaussian())
    alone.hyper.lr.zero_()  # so that both see the same gradients
    paired.hyper.lr.zero_()
    for i in range(41):
        x = randn(50, 40, seed=i) * scales
        y = randn(50, 5, seed=100 + i)
        alone(x.float(), y.float())
        paired(x, y)
    for k, p in alone._direction.items():
        assert_close(p.double(), paired._direction[k], 5e-4, k)
