"""Q learned for a model that stays as it is: how near the inverse, what is left alone, stopping and going on."""

from typing import Any

import pytest
import torch
from cases import assert_close, assert_same, filled, generator, randn, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff
from fishleg_func import reference

GAMMA = 0.02
CATEGORICAL = ff.likelihoods.Categorical()


def mlp() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


def batches(n: int = 2, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    x, y = randn(n * size, 4), torch.randint(3, (n * size,), generator=generator(1))
    return list(zip(x.split(size), y.split(size), strict=True))


def estimate(model: nn.Module, **keywords: Any) -> ff.InverseFisher:
    given = {"damping": GAMMA, "updates": 20, "generator": generator(0)} | keywords
    return ff.estimate_inverse_fisher(model, CATEGORICAL, given.pop("loader", batches()), **given)


def error(op: ff.InverseFisher, model: nn.Module) -> float:
    x = torch.cat([x for x, _ in batches()])
    inverse = reference.damped_inverse(reference.fisher(model, x, "categorical"), GAMMA)
    return float((op.dense() - inverse).norm() / inverse.norm())


# --- how near ---


@pytest.fixture(scope="module")
def joint() -> ff.InverseFisher:
    return estimate(mlp(), q="joint", updates=700)


def test_joint_comes_within_a_tenth_of_the_damped_inverse(joint: ff.InverseFisher) -> None:
    model = mlp()
    assert error(joint, model) <= 0.1 < error(estimate(model, q="joint", updates=20), model)


def test_without_coupling_between_layers_it_does_not() -> None:
    model = mlp()
    x = torch.cat([x for x, _ in batches()])
    inverse = reference.damped_inverse(reference.fisher(model, x, "categorical"), GAMMA)
    uncoupled = torch.zeros_like(inverse)
    for where, _ in reference.block_indices(model).values():
        uncoupled[where[:, None], where] = inverse[where[:, None], where]
    bound = float((uncoupled - inverse).norm() / inverse.norm())  # no Q made of layers is nearer
    reached = error(estimate(model, q="dense", updates=700), model)
    assert 0.1 < bound <= reached <= 1.4 * bound


def test_a_preconditioner_that_knows_the_coupling_needs_a_third_of_the_iterations(joint: ff.InverseFisher) -> None:
    b = randn(51)
    operator = ff.FisherOperator(mlp(), CATEGORICAL, batches(), damping=GAMMA)
    plain, preconditioned = operator.solve(b, tol=1e-3), operator.solve(b, tol=1e-3, preconditioner=joint)
    assert plain.converged and preconditioned.converged
    assert 3 * preconditioned.iterations <= plain.iterations


@pytest.mark.parametrize("q", ["kfac", "eigen", "kronecker", {"0": "dense", "2": "kfac"}])
def test_families_with_full_sides_come_nearer_than_the_start(q: Any) -> None:
    model = mlp()
    start, op = estimate(model, q="kronecker", updates=1), estimate(model, q=q, updates=150)
    assert error(op, model) < 0.9 * error(start, model)


def test_the_gradient_as_a_probe_needs_targets() -> None:
    model = mlp()
    assert (estimate(model, u="gradient").dense() - estimate(model).dense()).norm() > 1e-6
    with pytest.raises(ValueError, match="targets=None must be given with u='gradient'"):
        estimate(model, u="gradient", loader=[(batches()[0][0], None)])


# --- what is left alone ---


def test_the_model_and_the_global_stream_stay_as_they_were() -> None:
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))).train()
    before = snapshot(model)
    estimate(model)
    assert_same(before, snapshot(model))


def test_some_parameters_only() -> None:
    op = estimate(mlp(), include="2")
    assert op.names == ("2.weight", "2.bias")
    assert set(op.q) == {"2"}


def test_an_output_function_is_used() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    wrapped = estimate(Wrapped(), output=lambda out: out["logits"])
    assert_close(wrapped.dense(), estimate(mlp()).dense(), 1e-9)


# --- the loader ---


def test_an_exhausted_loader_is_begun_again() -> None:
    visits = []

    class Loader:
        def __iter__(self) -> Any:
            visits.append(0)
            for batch in batches():
                visits[-1] += 1
                yield batch

    estimate(mlp(), loader=Loader(), updates=5)
    assert visits == [2, 2, 1]


def test_a_data_loader() -> None:
    data = TensorDataset(torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()]))
    assert_close(estimate(mlp(), loader=DataLoader(data, 20)).dense(), estimate(mlp()).dense(), 1e-12)


def test_loaders_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="must yield batches, every time"):
        estimate(mlp(), loader=[])
    with pytest.raises(ValueError, match="a generator yields once"):
        estimate(mlp(), loader=(batch for batch in batches()))
    with pytest.raises(ValueError, match="has 3 parts and must be"):
        estimate(mlp(), loader=[(1, 2, 3)])


def test_batches_may_be_dicts_of_keyword_arguments() -> None:
    dicts = [{"input": x} for x, _ in batches()]
    assert_close(estimate(mlp(), loader=dicts).dense(), estimate(mlp()).dense(), 1e-12)


# --- the record, stopping, going on ---


def test_the_record_of_a_fit() -> None:
    fit = estimate(mlp(), updates=25, check_every=10).fit
    assert fit is not None
    assert (fit.updates, fit.stopped) == (25, False)
    assert [done for done, _ in fit.accuracy] == [10, 20, 25]
    assert all(0 < reading < 100 for _, reading in fit.accuracy)


def test_it_stops_where_the_tolerance_is_reached() -> None:
    kept = estimate(mlp(), q="joint", updates=300, check_every=25, damping=1.0).fit
    assert kept is not None and not kept.stopped
    tolerance = kept.accuracy[7][1]
    stopped = estimate(mlp(), q="joint", updates=300, check_every=25, damping=1.0, tolerance=tolerance).fit
    assert stopped is not None and stopped.stopped
    assert stopped.updates <= 200 and stopped.accuracy[-1][1] <= tolerance
    assert all(reading > tolerance for _, reading in stopped.accuracy[:-1])


@pytest.mark.parametrize("q", ["kfac", "joint"])
def test_going_on_is_as_if_it_had_not_been_stopped(q: str) -> None:
    whole = estimate(mlp(), q=q, updates=20, check_every=10)
    first = estimate(mlp(), q=q, updates=20, check_every=10, tolerance=1e9)
    assert first.fit is not None and first.fit.updates == 10
    second = estimate(mlp(), q=q, updates=20, check_every=10, state=first.fit.state, generator=generator(9))
    assert torch.equal(second.dense(), whole.dense())
    assert not torch.equal(second.dense(), first.dense())
    assert second.fit is not None and second.fit.updates == 20
    with pytest.raises(ValueError, match="updates=20 must be > 20"):
        estimate(mlp(), q=q, updates=20, state=second.fit.state)


def test_the_state_is_read_with_weights_only(tmp_path: Any) -> None:
    fit = estimate(mlp()).fit
    assert fit is not None
    torch.save(fit.state, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed = estimate(mlp(), updates=21, state=state).fit
    assert resumed is not None and resumed.updates == 21


def test_a_progress_bar_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    estimate(mlp())
    assert capsys.readouterr().out == ""
    estimate(mlp(), progress=True, check_every=10)
    shown = capsys.readouterr().out
    assert "20/20" in shown and "residual" in shown


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"damping": 0.0}, r"damping=0\.0 must be > 0"),
        ({"updates": 0}, "updates=0 must be an integer >= 1"),
        ({"check_every": 0}, "check_every=0 must be an integer >= 1"),
        ({"u": "momentum"}, "u='momentum' must be one of 'gaussian', 'gradient'"),
        ({"tolerance": -1.0}, r"tolerance=-1\.0 must be >= 0"),
        ({"aux_lr": 1.0}, r"aux_lr=1\.0 must be > 0 and < 1"),
        ({"q": "nothing"}, "q='nothing' must be one of .*'joint'"),
    ],
)
def test_wrong_arguments_are_refused(keywords: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        estimate(model, **keywords)
    assert not any(m._forward_hooks for m in model.modules())
