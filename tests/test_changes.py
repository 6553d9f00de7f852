"""What users do between steps: change the model or Q, copy, drop or measure, feed other kinds of batches."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections import UserDict

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian
from fishleg_func.schedule import is_due, is_refresh

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def momentum_is_the_gradient(step: ff.FishLegStep, x: Tensor, y: Tensor) -> None:
    """Take a step with beta = 0 and compare m with autograd."""
    step.hyper.beta.fill_(0)
    torch.manual_seed(7)
    loss = nn.functional.cross_entropy(step.model(x), y)
    names, params = zip(*step.model.named_parameters(), strict=True)
    truth = dict(zip(names, torch.autograd.grad(loss, params, allow_unused=True), strict=True))
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    torch.manual_seed(7)
    step(x, y)
    for block in step._runner.plan.blocks:
        filled = {n: before[n] * 0 if truth[n] is None else truth[n] for n in block.names.values()}
        torch.testing.assert_close(step._momentum[block.name], block.pack(filled), rtol=1e-4, atol=1e-6)


# --- a model that changes after it was planned for is refused ---


def swap_module(model: nn.Sequential) -> None:
    model[0] = nn.Linear(6, 8)


def freeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def unfreeze(model: nn.Sequential) -> None:
    model[2].bias.requires_grad_(True)


def convert(model: nn.Sequential) -> None:
    model.double()


def untie(model: nn.Sequential) -> None:
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


@pytest.mark.parametrize("change", [swap_module, freeze, unfreeze, convert, untie])
def test_a_changed_model_is_refused(change) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(*mlp(), nn.Linear(3, 8), nn.Linear(8, 3))
    model[4].weight, model[2].bias.requires_grad = model[2].weight, False
    step = ff.fishlegify(model, Categorical())
    step(X, Y)
    change(model)
    with pytest.raises(RuntimeError, match=r"changed since fishlegify: \['.*fishlegify again"):
        step(X, Y)
    ff.fishlegify(model, Categorical())(X.to(model[0].weight.dtype), Y)


def test_a_replaced_parameter_is_trained() -> None:
    model = mlp()
    step = ff.fishlegify(model, Categorical())
    step(X, Y)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    momentum_is_the_gradient(step, X, Y)


# --- buffers, Q and meters ---


class Counting(nn.Module):
    """A buffer that is reassigned, and one that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("reassigned", torch.zeros(()))
        self.register_buffer("written", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.reassigned = self.reassigned + 1
        self.written.add_(1)
        return self.layer(x)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_reassigned_buffers_are_kept(backend: str | None) -> None:
    model = Counting()
    step = ff.fishlegify(model, Categorical())
    call = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        call(X, Y)
    assert (model.reassigned, model.written) == (3, 3)


def test_what_is_written_into_q_is_taken_up_at_once() -> None:
    model = mlp()
    step = ff.fishlegify(model, Categorical())
    for _ in range(15):
        step(X, Y)
    before, direction = step.natural_gradient(X, Y), {k: p.clone() for k, p in step._direction.items()}
    step.q["0"].scale_(4.0)
    after = step.natural_gradient(X, Y)
    assert_close(after["0.weight"], 4 * before["0.weight"], 1e-5)
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert_close(step._direction["0"], 4 * direction["0"], 1e-4)


def test_measuring_does_not_change_training() -> None:
    runs = []
    for measured in (False, True):
        torch.manual_seed(0)
        step = ff.fishlegify(mlp(), Categorical(), fisher="sampled", u="gaussian")
        for _ in range(4):
            step(X, Y)
            if measured:
                step.accuracy(X, n=2)
        runs.append([p.detach().clone() for p in step.model.parameters()])
    assert all(map(torch.equal, *runs))
    assert step.accuracy(X, n=1) != step.accuracy(X, n=1)  # fresh probes


# --- copies, and steps that are dropped ---


def test_wrapped_models_are_pickled_saved_and_copied() -> None:
    model = mlp()
    step = ff.fishlegify(model, Categorical())
    step(X, Y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(twin(X), model(X))
        ff.fishlegify(twin, Categorical())(X, Y)
    step(X, Y)


def test_a_dropped_step_takes_its_hooks_along() -> None:
    model = mlp()
    for _ in range(3):
        step = ff.fishlegify(model, Categorical())
        step(X, Y)
        del step
        gc.collect()
    assert not any(m._forward_hooks for m in model.modules())


def test_the_caller_s_graph_is_not_kept() -> None:
    encoder = nn.Linear(6, 6)
    step = ff.fishlegify(mlp(), Categorical())
    step(encoder(X), Y)
    assert step._last is not None
    assert not step._last[0].requires_grad


# --- batches ---


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
        momentum_is_the_gradient(step, x, Y[: len(x)])


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


def test_a_bad_state_changes_nothing() -> None:
    step = ff.fishlegify(mlp(), Categorical())
    step(X, Y)
    kept, bad = step.state_dict(), step.state_dict()
    bad["hyper.lr"].fill_(9.0)
    for name, value in (("t", "x"), ("noise", 3), ("momentum.0", torch.zeros(2)), ("unknown", 1)):
        with pytest.raises(ValueError, match=name.partition(".")[0]):
            step.load_state_dict(bad | {name: value})
    for name, value in step.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[name])), name


def test_the_schedule_is_a_table() -> None:
    """Curvature at each of the first k steps, then one in k; bases at each, at every second, at every fourth."""
    due = [t for t in range(300) if is_due(t, 10)]
    assert due == [*range(10), *range(10, 300, 10)]
    assert [t for t in due if is_refresh(t, 10)] == [*range(10), 20, 40, 60, 80, 120, 160, 200, 240, 280]
    assert all(is_due(t, 1) for t in range(50))
