"""What users do between steps: change the model or Q, copy, drop or measure, save."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def momentum_is_the_gradient(step: ff.FishLegStep, x: Tensor, y: Tensor, seed: int = 7) -> None:
    """Take a step with beta = 0 and compare m with autograd."""
    step.hyper.beta.fill_(0)
    torch.manual_seed(seed)
    loss = nn.functional.cross_entropy(step.model(x), y)
    names, params = zip(*step.model.named_parameters(), strict=True)
    truth = dict(zip(names, torch.autograd.grad(loss, params, allow_unused=True), strict=True))
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    torch.manual_seed(seed)
    step(x, y)
    stream = torch.get_rng_state()
    torch.manual_seed(seed)
    step.model(x)
    assert torch.equal(stream, torch.get_rng_state())  # as after one plain forward
    for block in step._runner.plan.blocks:
        filled = {n: before[n] * 0 if truth[n] is None else truth[n] for n in block.names.values()}
        torch.testing.assert_close(step._averages.momentum()[block.name], block.pack(filled), rtol=1e-4, atol=1e-5)


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


class Squashed(nn.Module):
    """A parameter that the module shows as something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), 0.5))

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found.tanh() if name == "gain" else found

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_parameter_is_not_what_its_module_shows_in_its_place() -> None:
    model = nn.Sequential(nn.Linear(6, 3), Squashed())
    step = ff.fishlegify(model, Categorical())
    step(X, Y)
    assert (model[1]._parameters["gain"] != 0.5).all()


@pytest.mark.parametrize("other", [lambda: nn.LayerNorm(3), Squashed])
def test_a_replaced_module_is_trained_where_it_has_no_hook(other: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 3), other())
    step = ff.fishlegify(model, Categorical())
    for _ in range(12):
        step(X, Y)
    old = model[1]
    model[1] = new = other()
    before = [[p.detach().clone() for p in module.parameters()] for module in (old, new)]
    loss = nn.functional.cross_entropy(model(X), Y)
    torch.testing.assert_close(step(X, Y), loss)
    assert all(torch.equal(p, q) for p, q in zip(old.parameters(), before[0], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(new.parameters(), before[1], strict=True))


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


def test_a_step_is_not_copied() -> None:
    step = ff.fishlegify(mlp(), Categorical())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"must not be copied or pickled: .*load_state_dict"):
            copied(step)


def test_hooks_that_are_gone_are_noticed() -> None:
    step = ff.fishlegify(mlp(), Categorical())
    step(X, Y)
    step.model[0]._forward_hooks.clear()
    momentum_is_the_gradient(step, X, Y)


def test_a_state_holds_what_was_written_into_q() -> None:
    one, two = (ff.fishlegify(mlp(), Categorical()) for _ in range(2))
    for _ in range(12):
        one(X, Y)
    one.q["0"].scale_(100.0)
    two.model.load_state_dict(one.model.state_dict())
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        assert torch.equal(one(X, Y), two(X, Y))
    assert all(torch.equal(one._direction[k], two._direction[k]) for k in one.q)


def test_hyperparameters_are_filled_not_replaced() -> None:
    step = ff.fishlegify(mlp(), Categorical())
    for name in ("lr", "aux_lr", "learning_rate"):
        with pytest.raises(AttributeError, match=rf"hyper.{name} = 0.1 must be hyper.NAME.fill_"):
            setattr(step.hyper, name, 0.1)


class Remembering(nn.Module):
    """A buffer shaped by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("last", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.mean(1).detach()
        return self.layer(x)


def test_a_buffer_that_changes_shape_is_refused_before_anything_is_written() -> None:
    step = ff.fishlegify(Remembering(), Categorical())
    step(X, Y)
    kept = {k: v.clone() for k, v in step.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"buffers \['last'\] another shape or dtype"):
        step(X[:7], Y[:7])
    assert all(torch.equal(v, kept[k]) for k, v in step.model.state_dict().items())
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
