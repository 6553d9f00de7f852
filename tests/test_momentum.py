"""The momentum without a copy of its own: m = Q⁻¹ p is what a pair (m, p) keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, LIKELIHOODS, assert_close, randn, randomize_q_, targets_for
from torch import nn

import fishleg_func as ff
from fishleg_func._opaque import LONG
from fishleg_func.families import FAMILIES
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


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_q_of_every_family_is_undone(family: str, shape: tuple[int, ...]) -> None:
    q = FAMILIES[family](shape, dtype=torch.float64)
    for i in range(4):
        q.gather_(randn(*shape, seed=i))
    q.refresh_(torch.tensor(0.1, dtype=torch.float64))
    randomize_q_(q)
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


def implied(step: FishLegStep) -> dict[str, torch.Tensor]:
    return {k: m.clone() for k, m in step._averages.momentum().items()}


def trained(steps: int = 15) -> tuple[FishLegStep, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    step, x, y = ff.fishlegify(model, ff.likelihoods.Gaussian()), torch.randn(20, 6), torch.randn(20, 3)
    for _ in range(steps):
        step(x, y)
    return step, x, y


def test_a_checkpoint_is_gone_back_to_from_a_q_that_overflows() -> None:
    step, x, y = trained()
    saved, model, before = step.state_dict(), copy.deepcopy(step.model.state_dict()), implied(step)
    step(x, y)
    step.q["0"].L.mul_(1e25)
    with pytest.raises(FloatingPointError, match="direction"):
        step(x, y)
    step.load_state_dict(saved)
    step.model.load_state_dict(model)
    for k, m in implied(step).items():
        assert torch.equal(m, before[k])


@pytest.mark.parametrize("factor", [1e-20, 1e10, 1e20])
def test_the_momentum_outlives_any_scale_of_q(factor: float) -> None:
    step, x, y = trained()
    before = implied(step)
    for scale in (factor, 1 / factor):
        step.q["0"].scale_(scale)
        step.state_dict()  # an eager call
    for k, m in implied(step).items():
        assert_close(m, before[k], 1e-4, k)
    step(x, y)


def test_updates_of_q_between_steps_do_not_wear_the_momentum() -> None:
    step, x, y = trained(25)
    before = implied(step)
    for _ in range(30):
        step.update_aux(x, y)
    for k, m in implied(step).items():
        assert_close(m, before[k], 1e-6, k)


@pytest.mark.parametrize("every", [None, 10])
def test_a_group_added_after_q_was_written_keeps_the_momentum(every: int | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(20, 6)
    first, last = list(model[0].parameters()), list(model[2].parameters())
    likelihood = ff.likelihoods.Gaussian()
    optimizer = ff.FishLeg(model, likelihood, params=first, update_aux_every=every)
    for _ in range(15):
        optimizer.zero_grad()
        likelihood.nll(model(x), torch.zeros(20, 3)).backward()
        optimizer.step()
    before = implied(optimizer.fishleg)["0"]
    optimizer.fishleg.q["0"].scale_(100.0)
    optimizer.add_param_group({"params": last})
    averages = optimizer.fishleg._averages
    assert_close(averages.momentum()["0"], before, 1e-4)
    assert_close(averages.p["0"], optimizer.fishleg.q["0"](before), 1e-4)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_step_that_is_skipped_keeps_the_momentum(backend: str) -> None:
    torch._dynamo.reset()
    step, x, y = trained(19)  # the next one refreshes
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    before = implied(step)
    step.q["0"].L.mul_(1e25)
    step.state_dict()  # an eager call: Q is taken up
    compiled(x, y)
    assert step.skipped == 1
    step.q["0"].L.mul_(1e-25)
    step.state_dict()
    assert_close(implied(step)["0"], before["0"], 1e-4)


@pytest.mark.parametrize("what", ["gather", "renew"])
def test_what_fails_late_in_an_update_leaves_p(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, x, y = trained(20)
    before = {k: t.clone() for k, t in step.state_dict().items() if isinstance(t, torch.Tensor)}

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(step._averages if what == "renew" else step._curvature, what, fail)
        step.update_aux(x, y)
    after = step.state_dict()
    assert [k for k, tensor in before.items() if not torch.equal(tensor, after[k])] == []
