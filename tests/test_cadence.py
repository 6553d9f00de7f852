"""When steps take statistics of the Fisher, refresh bases and move λ; and what statistics weigh."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import generator, randn
from loops import assert_same_state, built, labels, optimizer_of, parameters
from test_changes import X, Y, mlp
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fishleg_func.schedule import CADENCE, is_due, is_refresh, spacing

EVERY = {1: 1, 15: 1, 16: 2, 39: 2, 40: 5, 79: 5, 80: 10, 5000: 10}  # by rows of a batch
RATES = {1: 0.005, 2: 0.01, 5: 0.025, 10: 0.05}  # least weights, by steps between statistics


def test_the_schedule_is_a_table() -> None:
    """Curvature at each of the first k steps, then one in k; bases at five of these, then ever fewer."""
    due = [t for t in range(4000) if is_due(t, 10, 10)]
    assert due == [*range(10), *range(10, 4000, 10)]
    refreshed = [t for t in due if is_refresh(t, 10)]
    early = (*range(20, 100, 20), *range(120, 400, 40), *range(400, 800, 80))
    later = (*early, *range(800, 3200, 160), *range(3200, 4000, 320))
    assert refreshed == [0, 1, 2, 4, 8, *later]
    assert all(is_due(t, 1, 1) for t in range(50))
    alone = [t for t in range(200) if is_due(t, 20, 50)]  # a family without a basis
    assert alone == [*range(50), *range(60, 200, 20)]
    assert [t for t in alone if is_refresh(t, 20)] == [0, 1, 2, 4, 8, 40, 80, 120, 160]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"update_aux_every": 10}, 10),
        ({"update_aux_every": 5}, 5),
        ({"q": "kronecker"}, 50),
        ({"q": {"0": "dense"}, "update_aux_every": 5}, 50),
        ({"q": "kronecker", "update_aux_every": 60}, 60),
        ({"q": "kronecker", "update_aux_every": 0}, 10),
    ],
)
def test_first_steps_that_all_update_q(options: dict[str, Any], first: int) -> None:
    step, due = ff.fishlegify(mlp(), Categorical(), **options), []
    for _ in range(first + 3):
        due.append(step.due)
        step(X, Y)
    assert due == [True] * (first + 1) + [False] * 2  # the next is one of every few


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    return randn(rows, 4, seed=seed), labels(rows, seed=seed)


def due_steps(step: ff.FishLegStep, rows: int, count: int = 32) -> list[int]:
    due = []
    for t in range(count):
        if step.due:
            due.append(t)
        step(*batch(rows, t))
    return due


@pytest.mark.parametrize("rows", EVERY)
def test_small_batches_give_statistics_more_often(rows: int) -> None:
    every = EVERY[rows]
    assert spacing(rows) == every
    assert CADENCE % every == 0  # so that the steps that refresh bases are among those that take statistics
    step = ff.fishlegify(built("mlp"), Categorical())
    assert due_steps(step, rows) == [t for t in range(32) if t < CADENCE or t % every == 0]


@pytest.mark.parametrize("options", [{"update_aux_every": 10}, {"q": "kronecker"}, {"q": {"0": "dense", "*": "kfac"}}])
def test_what_is_asked_for_holds_and_families_without_a_basis_take_no_more(options: dict[str, Any]) -> None:
    step = ff.fishlegify(built("mlp"), Categorical(), **options)
    first = 10 if "q" not in options else 50
    assert due_steps(step, 4, 73) == [t for t in range(73) if t < first or t % 10 == 0]


def test_kfac_takes_statistics_as_often() -> None:
    step = ff.fishlegify(built("mlp"), Categorical(), update_aux_every=0)
    assert due_steps(step, 20) == [*range(10), *range(10, 32, 2)]


@pytest.mark.parametrize("rows", [4, 20, 50, 100])
def test_bases_and_lambda_keep_their_schedule(rows: int) -> None:
    step = ff.fishlegify(built("mlp"), Categorical())
    moved = []
    for t in range(130):
        before = {k: v.clone() for k, v in step.state_dict().items() if isinstance(v, Tensor)}
        step(*batch(rows, t))
        after = step.state_dict()
        basis, lam = (not torch.equal(before[k], after[k]) for k in ("operator.0.0", "q.0.L"))
        assert basis == lam
        if lam:
            moved.append(t)
    assert moved == [0, 1, 2, 4, 8, 20, 40, 60, 80, 120]


@pytest.mark.parametrize(
    ("shape", "likelihood", "options", "rows"),
    [
        ((7, 3), Categorical(), {}, 7),
        ((7, 3, 3), Categorical(), {}, 21),  # tokens are terms
        ((7, 3), Gaussian(), {}, 7),  # entries of an output are not
        ((60, 3), Gaussian(), {"aux_batch_size": 17}, 17),
        ((60, 3), Gaussian(), {}, 60),
    ],
)
def test_rows_are_terms_that_q_learns_from(
    shape: tuple[int, ...], likelihood: Likelihood, options: dict[str, Any], rows: int
) -> None:
    step = ff.fishlegify(nn.Linear(4, 3).double(), likelihood, **options)
    x, y = randn(*shape[:-1], 4), randn(*shape)
    step(x, y.argmax(-1) if isinstance(likelihood, Categorical) else y)
    assert step.state_dict()["rows"] == rows


LENGTHS = (24, 24, 24, 100, 6)


def length(i: int) -> int:
    return LENGTHS[i % 5]


def run(optimizer: ff.FishLeg, model: nn.Module, i: int, rows: int) -> None:
    x, y = batch(rows, i)
    optimizer.zero_grad()
    Categorical().nll(model(x), y).backward()
    optimizer.step()


def test_both_front_ends_agree_where_batches_differ_in_length() -> None:
    mine, other = built("mlp"), built("mlp")
    optimizer, step = optimizer_of(mine), ff.fishlegify(other, Categorical(), generator=generator(3))
    due = []
    for i in range(50):
        assert optimizer.fishleg.due == step.due
        due.append(step.due)
        run(optimizer, mine, i, length(i))
        step(*batch(length(i), i))
    assert len(set(due[10:])) == 2
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6


@pytest.mark.parametrize("at", [3, 11, 18, 23])
def test_resuming_is_bit_exact_where_batches_are_small(at: int) -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    for i in range(at):
        run(optimizer, model, i, length(i))
    again, saved = copy.deepcopy(model), optimizer.state_dict()
    resumed = optimizer_of(again)
    resumed.load_state_dict(saved)
    for i in range(at, 40):
        run(optimizer, model, i, length(i))
        run(resumed, again, i, length(i))
    assert torch.equal(parameters(model), parameters(again))
    assert_same_state(optimizer.fishleg.state_dict(), resumed.fishleg.state_dict())


def test_what_is_asked_for_holds_after_resuming_from_a_state_of_another_cadence() -> None:
    step, other = (ff.fishlegify(built("mlp"), Categorical(), update_aux_every=every) for every in (3, 10))
    for t in range(10):
        other(*batch(100, t))
    step.load_state_dict(other.state_dict())
    assert due_steps(step, 4, 7) == [2, 5]  # steps 12 and 15


def test_a_step_that_raises_leaves_the_cadence(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ff.fishlegify(built("mlp"), Categorical())
    step(*batch(100, 0))
    before = step.state_dict()

    def prepare(*_: Any, **__: Any) -> None:
        raise FloatingPointError("a statistic of the Fisher")

    with monkeypatch.context() as patch:
        patch.setattr(step._curvature, "prepare", prepare)
        with pytest.raises(FloatingPointError):
            step(*batch(6, 1))
    assert_same_state(before, step.state_dict())
    step(*batch(6, 1))
    assert (before["rows"], step.state_dict()["rows"]) == (100, 6)


@pytest.mark.parametrize(
    ("lengths", "options", "steps"),
    [
        ((12,), {}, 230),
        ((24,), {}, 230),
        ((50,), {}, 230),
        ((100,), {}, 300),
        (LENGTHS, {}, 400),
        ((100,), {"update_aux_every": 15}, 250),
    ],
)
def test_statistics_are_means_that_forget_over_as_many_steps(
    lengths: tuple[int, ...], options: dict[str, Any], steps: int
) -> None:
    """With parameters that stay, against weighted means of what each batch alone says."""
    model = built("mlp")
    step = ff.fishlegify(model, Bernoulli(), lr=1e-30, **options)
    every, cov, level, count, least = 1, torch.zeros(5, 5).double(), torch.zeros(()).double(), 0, 1.0
    for t in range(steps):
        rows = lengths[t % len(lengths)]
        x = randn(rows, 4, seed=t)
        if t < options.get("update_aux_every", CADENCE) or t % every == 0:
            every = options.get("update_aux_every", spacing(rows))
            least = min(least, RATES.get(every, 0.05))
            count += 1
            weight = max(1 / count, RATES.get(every, 0.05))
            a = torch.cat((x, torch.ones(rows, 1)), 1)
            p = model(x).sigmoid()
            cov, level = cov.lerp(a.mT @ a / rows, weight), level.lerp((p * (1 - p)).mean().detach(), weight)
        step(x, x[:, :3].sigmoid())
    assert count > 1 / least  # beyond the plain mean
    state = step.state_dict()
    assert state["fisher.count"] == count == step.q["0"].count
    torch.testing.assert_close(step.q["0"].cov_L, cov)
    torch.testing.assert_close(state["fisher.level"][0], level)


def test_the_cadence_stays_where_a_layer_is_frozen() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    for i in range(12):
        run(optimizer, model, i, 100)
    model[0].requires_grad_(False)
    before = optimizer.fishleg
    run(optimizer, model, 12, 6)
    assert optimizer.fishleg is not before
    assert optimizer.fishleg.state_dict()["rows"] == 100  # the next statistics are due at step 20
