"""What makes a step fast changes nothing but its cost: factored updates, carried directions, products by halves."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_close, randn
from test_qmodules import build, check_relative, check_retract
from torch import nn

import fishleg_func as ff
from fishleg_func import _linalg, blocks
from fishleg_func._trees import dense
from fishleg_func._types import LowRank


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linalg, "_LEAF", 3)


@pytest.mark.usefixtures("small_leaves")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 29])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_products_and_inverses_by_halves(n: int, lead: tuple[int, ...]) -> None:
    a = randn(*lead, n, n, seed=n)
    lower = a.tril() / n + torch.eye(n)
    torch.testing.assert_close(_linalg.inverse_lower(lower), lower.inverse(), rtol=1e-10, atol=1e-10)
    wide = randn(*lead, n, 5, seed=n + 1)
    torch.testing.assert_close(_linalg.outer_square(wide), wide @ wide.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["inverse_lower", "outer_square"])
def test_products_by_halves_save_work(side: str) -> None:
    """Count FLOPs: at most 0.7 of the plain product's, for a side of 1000."""
    from torch.utils.flop_counter import FlopCounterMode

    a = torch.eye(1000)
    with FlopCounterMode(display=False) as counted:
        getattr(_linalg, side)(a)
    assert 0 < counted.get_total_flops() <= 0.7 * 2 * 1000**3


@pytest.mark.parametrize("name", ["kronecker", "kfac", "scaled_kronecker", "embedding"])
@pytest.mark.parametrize("rows", [1, 2, None])
@pytest.mark.parametrize("max_dim", [4096, 10])
@pytest.mark.parametrize("shape", [(9, 16), (2, 16, 9), (5, 27)])
def test_steps_along_factored_gradients(name: str, rows: int | None, max_dim: int, shape: tuple[int, ...]) -> None:
    """Hold them where few rows meet sides long enough that no square matrix but λ and its operator is formed."""
    case = build(name, shape, torch.float64, 3, 0.5, max_dim)
    check_relative(case, (rows is not None,) * 2)
    check_retract(case, rows)


@pytest.mark.parametrize("name", ["kronecker", "kfac"])
@pytest.mark.parametrize("max_dim", [4096, 10])
@pytest.mark.parametrize("shape", [(9, 16), (2, 16, 9), (5, 27), (27, 5)])
@pytest.mark.parametrize("ok", [None, True, False])
def test_a_carried_direction_is_q_times_the_momentum(
    name: str, max_dim: int, shape: tuple[int, ...], ok: bool | None
) -> None:
    case = build(name, shape, torch.float64, 3, 0.5, max_dim)
    allowed = None if ok is None else torch.tensor(ok)
    operator, m = case.q.operator(), case.probe()
    before = dense(case.q.act(operator, m))
    u, w = (case.probe(factored=True, rows=1) for _ in range(2))
    gradients = case.q.relative(operator, u, case.q.act(operator, u), w)
    carry = case.q.retract_(operator, gradients, torch.tensor(0.3).double(), allowed)
    after = dense(case.q(m))
    assert ((after - before).norm() > 1e-3 * before.norm()) == (ok is not False)
    if min(shape[-2:]) > 5:  # shorter sides take the dense way
        assert carry is not None
    if carry is not None:
        assert_close(carry(before), after, 1e-10)


def test_no_square_matrix_is_multiplied_where_few_rows_meet_long_sides() -> None:
    """Count the FLOPs of a move of λ: far below one product of two square matrices."""
    from torch.utils.flop_counter import FlopCounterMode

    q = ff.families.KFAC((512, 512))
    operator = q.operator()
    u, w = (LowRank(torch.randn(8, 512), torch.randn(8, 512)) for _ in range(2))
    v = q.act(operator, u)
    with FlopCounterMode(display=False) as counted:
        carry = q.retract_(operator, q.relative(operator, u, v, w), torch.tensor(0.2))
        assert carry is not None
        carry(torch.randn(512, 512))
    assert counted.get_total_flops() < 0.5 * 2 * 512**3


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(140, 130), nn.Tanh(), nn.Linear(130, 3))


@pytest.mark.parametrize("rows", [1, blocks._PROBE_ROWS, 2 * blocks._PROBE_ROWS - 1])
def test_few_rows_are_all_probed(rows: int) -> None:
    step = ff.fishlegify(wide(), ff.likelihoods.Gaussian())
    batch = step._runner.run(torch.randn(rows, 140), torch.randn(rows, 3), twice=True)
    _, g, _ = batch.gradient()
    assert all(x is g[k] for k, x in batch.probe().items())


def test_many_rows_are_probed_evenly_and_the_estimate_is_that_of_the_gradient() -> None:
    """Hold that the probe of the long layer is the gradient of every k-th example, and exact for equal examples."""
    model, count = wide().double(), 4 * blocks._PROBE_ROWS
    step = ff.fishlegify(model, ff.likelihoods.Gaussian())
    x, y = randn(count, 140), randn(count, 3, seed=1)
    batch = step._runner.run(x, y, twice=True)
    u, g = batch.probe(), batch.gradient()[1]
    twin = copy.deepcopy(model)
    ff.likelihoods.Gaussian().nll(twin(x[::4]), y[::4]).backward()
    assert isinstance(u["0"], LowRank) and u["0"].d.shape[0] == blocks._PROBE_ROWS
    assert_close(u["0"].dense()[:, :-1], twin[0].weight.grad, 1e-10)  # type: ignore[arg-type]
    assert u["2"] is g["2"]
    equal = step._runner.run(x[:1].expand(count, -1), y[:1].expand(count, -1), twice=True)
    assert_close(dense(equal.probe()["0"]), dense(equal.gradient()[1]["0"]), 1e-10)


def test_probes_of_long_layers_lower_the_auxiliary_loss() -> None:
    """Learn Q of a layer with long sides from probes of few rows, where nothing else moves it."""
    model, count = nn.Linear(130, 130, bias=False).double(), 8 * blocks._PROBE_ROWS
    x = randn(count, 130) * torch.linspace(0.2, 2, 130).double()
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(), q="kronecker", damping=1.0, aux_lr=0.3)
    step.update_aux(x, randn(count, 130))
    first = step.accuracy(x, 4).overall
    for i in range(150):
        step.update_aux(x, randn(count, 130, seed=i))
    assert step.accuracy(x, 4).overall < 0.8 * first
