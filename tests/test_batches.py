"""Batches of other kinds: calls that depend on values or chance, masks, mappings, bad input."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from test_changes import X, Y, mlp, momentum_is_the_gradient
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian


class Selecting(nn.Module):
    """A layer that sees as many rows as the values say, and one that is called once or twice by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.often, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = x[:, 0] > 0
        x = x.index_put((keep,), self.some(x[keep]))
        for _ in range(int(torch.randint(1, 4, ()))):
            x = torch.tanh(self.often(x))
        return self.out(x)


def test_calls_may_depend_on_values_and_on_chance() -> None:
    step = ff.fishlegify(Selecting(), Categorical())
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        x = torch.randn(2 if i % 2 else 12, 6, generator=generator)
        momentum_is_the_gradient(step, x, Y[: len(x)], seed=i)


def test_later_targets_are_checked_too() -> None:
    step = ff.fishlegify(mlp(), Categorical())
    step(X, Y)
    with pytest.raises(ValueError, match=r"\[0, 7\] must be in \[0, 2\]"):
        step(X, Y.clone().index_fill(0, torch.tensor([3]), 7))


def test_a_refused_first_batch_does_not_settle_the_likelihood() -> None:
    step = ff.fishlegify(mlp())
    with pytest.raises(FloatingPointError):
        step(X, torch.full((12, 3), torch.nan))
    assert step.likelihood is None
    step(X, Y)
    assert isinstance(step.likelihood, Categorical)


def test_a_likelihood_resolved_in_compiled_code_is_kept() -> None:
    step = ff.fishlegify(mlp())
    torch.compile(step, fullgraph=True, backend="aot_eager")(X, Y)
    assert isinstance(step.likelihood, Categorical)
    assert step.accuracy(X, n=1).overall > 0


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        assert table.shape == (50, 6)
        return self.layer(x + table.mean(0))


def test_the_auxiliary_batch_cuts_examples_only_and_may_be_masked() -> None:
    step = ff.fishlegify(Mixing(), Categorical(), aux_batch_size=4)
    inputs, masked = (X, torch.ones(50, 6)), torch.where(torch.arange(12) < 4, -100, Y)
    losses = [step(inputs, targets) for targets in (Y, masked, Y)]
    assert all(loss.isfinite() for loss in losses)


def test_mappings_are_keyword_arguments() -> None:
    inputs = {"x": X, "table": torch.ones(50, 6)}
    model = Mixing()
    one, two = (ff.fishlegify(m, Categorical()) for m in (model, copy.deepcopy(model)))
    assert torch.equal(one(inputs, Y), two(UserDict(inputs), Y))


def test_a_masked_auxiliary_batch_leaves_the_statistics() -> None:
    step = ff.fishlegify(nn.Linear(6, 3), Categorical(), aux_batch_size=4)
    step(X, Y)
    kept = {k: getattr(step.q["(root)"], k).clone() for k in ("cov_L", "cov_R", "count")}
    step(X, torch.where(torch.arange(12) < 4, -100, Y))
    assert all(torch.equal(getattr(step.q["(root)"], k), t) for k, t in kept.items())


class Switched(nn.Module):
    """A weight that is used outside of its layer where a flag, or the mode of a part, says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.part, self.out = nn.Linear(6, 6), nn.Dropout(0.0), nn.Linear(6, 3)

    def forward(self, x: Tensor, n: int) -> Tensor:
        extra = nn.functional.linear(x, self.layer.weight) if n or not self.part.training else 0
        return self.out(torch.tanh(self.layer(x)) + extra)


@pytest.mark.parametrize("switch", ["flag", "mode"])
def test_a_use_that_a_flag_or_a_mode_brings_is_found(switch: str) -> None:
    step = ff.fishlegify(Switched(), Categorical(), beta=0.0)
    step((X, 0), Y)
    if switch == "mode":
        step.model.part.eval()
    n = int(switch == "flag")
    loss = nn.functional.cross_entropy(step.model(X, n), Y)
    truth = torch.autograd.grad(loss, step.model.layer.weight)[0]
    step((X, n), Y)
    torch.testing.assert_close(step._averages.momentum()["layer"][:, :-1], truth, rtol=1e-4, atol=1e-6)


def test_masked_rows_do_not_dilute_the_statistics() -> None:
    padded = torch.cat((X, torch.zeros(108, 6)))
    targets = torch.cat((Y, torch.full((108,), -100)))
    covariances = []
    for x, y in ((X, Y), (padded, targets)):
        step = ff.fishlegify(nn.Linear(6, 3), Categorical())
        step(x, y)
        covariances.append(step.q["(root)"].cov_L)
    torch.testing.assert_close(*covariances)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ff.fishlegify(mlp(), Categorical())(X, None), TypeError, "torch.as_tensor"),
        (lambda: ff.fishlegify(mlp(), q=lambda *_, **__: nn.Linear(1, 1)), TypeError, "must make a QModule"),
        (lambda: ff.fishlegify(mlp(), Categorical()).update_aux(X, [1]), TypeError, "torch.as_tensor"),
        (lambda: ff.fishlegify(nn.LazyLinear(3)), ValueError, "run the model on a batch first"),
        (
            lambda: ff.fisher_vector_product(
                nn.Linear(6, 3), Categorical(0), X.repeat(20, 1), {"weight": torch.ones(3, 6)}, kind="antithetic"
            ),
            ValueError,
            "ignore_index=0 must be none of the classes",
        ),
        (lambda: ff.fishlegify(mlp(), include=3), TypeError, "must be a glob"),
        (lambda: ff.fishlegify(mlp(), include=[]), ValueError, "no parameter is left"),
        (lambda: ff.fishlegify(mlp(), aux_betas=0.9), ValueError, "two numbers"),
        (lambda: ff.fishlegify(mlp(), precondition_aux="no"), ValueError, "precondition_aux='no'"),
        (lambda: ff.fishlegify(mlp(), Categorical()).accuracy(X, n=2.5), ValueError, "n=2.5 must be"),
        (lambda: ff.fishlegify(mlp(), Gaussian(torch.ones(4)))(X, X[:, :3]), ValueError, "must broadcast"),
    ],
)
def test_more_bad_input(call, error: type[Exception], words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        call()


def test_autocast_is_refused() -> None:
    step = ff.fishlegify(mlp(), Categorical())
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast is on, and must be off"):
        step(X, Y)
