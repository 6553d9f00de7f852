"""What torch asks of an optimizer: groups, schedulers, parameters without gradients, and errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import generator, randn
from loops import MODELS, assert_same_state, built, labels, optimizer_of, parameters, train
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian


def test_groups_have_their_own_rate_decay_and_damping() -> None:
    model = built("mlp")
    first, last = list(model[0].parameters()), list(model[2].parameters())  # type: ignore[index]
    groups = [{"params": first, "lr": 0.0, "weight_decay": 0.5}, {"params": last, "lr": 0.1, "damping": 2.0}]
    optimizer = optimizer_of(model, params=groups, weight_decay=0.0)
    before = [p.detach().clone() for p in (*first, *last)]
    train(optimizer, model, "mlp", range(1))
    assert all(torch.equal(p, b) for p, b in zip(first, before[:2], strict=True))
    moved = torch.cat([last[0] - before[2], (last[1] - before[3])[:, None]], -1)
    assert torch.allclose(moved.norm(), torch.tensor(0.1 * 3**0.5).double())  # lr times the norm of the layer
    damping = optimizer.fishleg._curvature.damping()
    assert damping["2"].item() == 2.0 and damping["0"].item() not in {0.0, 2.0}
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1, 0.0
    second, other = [p.detach().clone() for p in first], [p.detach().clone() for p in last]
    train(optimizer, model, "mlp", range(1, 2))
    assert not torch.equal(first[0], second[0]) and all(torch.equal(p, b) for p, b in zip(last, other, strict=True))


def test_one_layer_may_be_in_two_groups_with_one_damping() -> None:
    model, same = built("mlp"), built("mlp")
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.2}, {"params": biases}]
    optimizer = optimizer_of(model, params=groups, weight_decay=0.0)
    plain = optimizer_of(same, weight_decay=0.0)
    for opt, m in ((optimizer, model), (plain, same)):
        train(opt, m, "mlp", range(1))
    start = built("mlp")
    for name, p in model.named_parameters():
        decayed = p + 0.03 * 0.2 * start.get_parameter(name) * (p.ndim > 1)
        assert torch.allclose(decayed, same.get_parameter(name))
    with pytest.raises(ValueError, match=r"different damping.*must share them"):
        ff.FishLeg(
            (again := built("mlp")), Categorical(),
            params=[{"params": [p for p in again.parameters() if p.ndim > 1], "damping": 1.0},
                    {"params": [p for p in again.parameters() if p.ndim == 1]}],
        )  # fmt: skip


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: t / 12),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [4],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_torch_set_the_rate(scheduler: str) -> None:
    model = built("mlp")
    optimizer = optimizer_of(model, weight_decay=0.0)
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for i in range(11):
        before = parameters(model[2])  # type: ignore[index]
        rates.append(float(optimizer.param_groups[0]["lr"]))
        loss = train(optimizer, model, "mlp", range(i, i + 1))[0]
        schedule.step(1.0) if scheduler == "plateau" else schedule.step()
        step = (parameters(model[2]) - before).norm()  # type: ignore[index]
        assert torch.allclose(step, torch.tensor(rates[-1] * 3**0.5).double(), atol=1e-9), (i, loss)
    assert len(set(rates)) > 2
    if scheduler == "onecycle":
        assert optimizer.fishleg.hyper.beta.item() == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=0.03)


def test_maximize_climbs() -> None:
    up, down = built("mlp"), built("mlp")
    a, b = optimizer_of(up, maximize=True), optimizer_of(down)
    x, y = MODELS["mlp"][1](0)
    (-Categorical().nll(up(x), y)).backward()
    Categorical().nll(down(x), y).backward()
    a.step()
    b.step()
    assert torch.equal(parameters(up), parameters(down))


def test_parameters_without_gradient_stay_and_keep_their_momentum() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, which: str) -> Tensor:
            out: Tensor = getattr(self, which)(x)
            return out

    torch.manual_seed(0)
    model = Branches().double()
    optimizer = optimizer_of(model)
    for i in range(25):
        which = "a" if i % 2 else "b"
        other = getattr(model, "b" if i % 2 else "a")
        pair, idle = optimizer.fishleg._averages, "b" if i % 2 else "a"
        before, m = parameters(other), pair.momentum()[idle]
        optimizer.zero_grad()
        Categorical().nll(model(randn(12, 4, seed=i), which), labels(12, seed=i)).backward()
        optimizer.step()
        assert torch.equal(before, parameters(other))
        torch.testing.assert_close(pair.momentum()[idle], m)
        for k, m in pair.momentum().items():  # p = Q m stays true
            assert torch.allclose(pair.p[k], optimizer.fishleg.q[k](m), atol=1e-10)


def test_a_group_that_is_added_later_trains_and_keeps_what_was_learned() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model, params=model[2].parameters())  # type: ignore[index]
    train(optimizer, model, "mlp", range(12))
    first, learned = parameters(model[0]), optimizer.fishleg.q["2"].L.clone()  # type: ignore[index]
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})  # type: ignore[index]
    assert torch.equal(optimizer.fishleg.q["2"].L, learned) and not torch.equal(learned, torch.eye(7).double())
    assert torch.equal(first, parameters(model[0]))  # type: ignore[index]
    losses = train(optimizer, model, "mlp", range(12, 24))
    assert not torch.equal(first, parameters(model[0])) and all(x < 10 for x in losses)  # type: ignore[index]
    assert len(model._forward_hooks) == 1 and len(model[0]._forward_hooks) == 2  # type: ignore[index]
    with pytest.raises(ValueError, match="must be one of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2
    train(optimizer, model, "mlp", range(24, 26))


def bad_calls() -> dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]]:
    return {
        "no likelihood": (lambda m: ff.FishLeg(m), TypeError, "likelihood=None must be given"),
        "unknown": (lambda m: ff.FishLeg(m, Categorical(), momentums=1), TypeError, "momentums"),
        "strange": (lambda m: ff.FishLeg(m, Categorical(), params=[nn.Parameter(torch.ones(1))]), ValueError, "model"),
        "lr": (lambda m: ff.FishLeg(m, Categorical(), lr=-1.0), ValueError, "lr=-1.0 must be >= 0"),
        "beta": (lambda m: ff.FishLeg(m, Categorical(), beta=1.0), ValueError, "beta=1.0"),
        "damping": (lambda m: ff.FishLeg(m, Categorical(), damping=0.0), ValueError, "damping=0.0"),
        "both": (lambda m: ff.FishLeg(m, Categorical(), params=m.parameters(), include="0"), TypeError, "together"),
        "renamed": (lambda m: ff.FishLeg(m, Categorical(), u_sampling="gaussian"), TypeError, r"u_sampling \(use u\)"),
        "empirical": (lambda m: ff.FishLeg(m, Categorical(), fisher="empirical"), ValueError, "aux_loader="),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_bad_calls_are_refused_and_leave_no_hook(case: str) -> None:
    call, error, words = bad_calls()[case]
    model = built("mlp")
    with pytest.raises(error, match=words):
        call(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("taken", [0, 3])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_is_changed(taken: int) -> None:
    model = built("cnn")
    optimizer = optimizer_of(model, update_aux_every=2)
    train(optimizer, model, "cnn", range(taken))
    x, y = MODELS["cnn"][1](9)
    optimizer.zero_grad()
    Categorical().nll(model(x), y).backward()
    next(iter(model.parameters())).grad.fill_(float("nan"))  # type: ignore[union-attr]
    before, state, stream = parameters(model), optimizer.fishleg.state_dict(), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        optimizer.step()
    assert torch.equal(before, parameters(model)) and torch.equal(stream, torch.get_rng_state())
    assert_same_state(state, optimizer.fishleg.state_dict())
    train(optimizer, model, "cnn", range(taken, taken + 3))


def test_a_loop_that_does_not_call_the_model_is_told_so() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    Categorical().nll(model[2](model[0](randn(12, 4)).tanh()), labels(12)).backward()  # type: ignore[index]
    with pytest.raises(RuntimeError, match="no forward pass of the model"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    optimizer = optimizer_of(model)
    Categorical().nll(model(labels(4, 2)), labels(4)).backward()
    p = model[0].weight
    p.grad = None
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (5, 3))
    with pytest.raises(ValueError, match=r"\['0.weight'\] must be dense"):
        optimizer.step()


def test_removing_takes_all_hooks_off() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    optimizer.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    Categorical().nll(model(randn(12, 4)), labels(12)).backward()
    with pytest.raises(RuntimeError, match="removed"):
        optimizer.step()


def test_copies_are_refused() -> None:
    optimizer = optimizer_of(built("mlp"))
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(optimizer)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for make in (lambda m: ff.fishlegify(m, Categorical()), lambda m: ff.FishLeg(m, Categorical())):
        model = built("mlp")
        with pytest.raises(RuntimeError, match="2 processes train together"):
            make(model)
        assert not any(m._forward_hooks for m in model.modules())


def frozen_first() -> nn.Module:
    model = built("mlp")
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"damping": 1.0}])
def test_a_group_that_cannot_be_added_changes_nothing(bad: dict[str, Any]) -> None:
    model = built("mlp")
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    optimizer = optimizer_of(model)
    train(optimizer, model, "mlp", range(3))
    before, state = optimizer.fishleg, optimizer.fishleg.state_dict()
    model[0].bias.requires_grad_(True)  # type: ignore[index]
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [model[0].bias], **bad})  # type: ignore[index]
    assert optimizer.fishleg is before and len(optimizer.param_groups) == 1
    assert_same_state(state, optimizer.fishleg.state_dict())
    assert len(model[0]._forward_hooks) == 2  # type: ignore[index]
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    train(optimizer, model, "mlp", range(3, 5))


def test_layers_are_unfrozen_by_adding_plain_parameters_or_where_they_are_in_a_group_already() -> None:
    for within in (False, True):
        model = frozen_first()
        optimizer = optimizer_of(model, params=list(model.parameters()) if within else None)
        train(optimizer, model, "mlp", range(3))
        learned, first = optimizer.fishleg.q["2"].L.clone(), parameters(model[0])  # type: ignore[index]
        model[0].requires_grad_(True)  # type: ignore[index]
        if not within:
            optimizer.add_param_group({"params": model[0].parameters()})  # type: ignore[index]
            assert torch.equal(learned, optimizer.fishleg.q["2"].L)
        train(optimizer, model, "mlp", range(3, 5))
        assert not torch.equal(first, parameters(model[0]))  # type: ignore[index]
        assert optimizer.fishleg._curvature._count >= 5  # its statistics went on


def test_what_the_loop_writes_into_its_inputs_after_the_pass_does_not_matter() -> None:
    models = [built("mlp"), built("mlp")]
    optimizers = [optimizer_of(m) for m in models]
    buffer = torch.zeros(12, 4).double()
    for i in range(12):
        x, y = MODELS["mlp"][1](i)
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            Categorical().nll(model(buffer.copy_(x) if k else x), y).backward()
            buffer.zero_()
            optimizer.step()
    assert torch.equal(*map(parameters, models))


@pytest.mark.parametrize(
    "likelihood", [Gaussian(ignore_value=math.nan), Categorical(weight=torch.tensor([1.0, 10, 0.1]))]
)
def test_masked_elements_and_class_weights_are_told_by_the_gradient(likelihood: Any) -> None:
    mine, other = built("mlp"), built("mlp")
    optimizer, step = optimizer_of(mine, likelihood), ff.fishlegify(other, likelihood, generator=generator(3))
    for i in range(12):
        x, y = MODELS["mlp"][1](i)
        if isinstance(likelihood, Gaussian):
            y = torch.where(randn(12, 3, seed=i) > 0.5, randn(12, 3, seed=i + 90), math.nan)
        optimizer.zero_grad()
        likelihood.nll(mine(x), y).backward()
        optimizer.step()
        step(x, y)
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6


def test_a_scaler_and_maximize_reach_sigma() -> None:
    x, y = randn(50, 4).float(), randn(50, 3, seed=1).float()
    sigmas = []
    for way in ("plain", "scaled", "maximize", "model"):
        torch.manual_seed(0)
        model, likelihood = nn.Linear(4, 3), Gaussian(2.0, learn_sigma=True)
        optimizer = optimizer_of(model, likelihood, maximize=way == "maximize")
        scaler = torch.amp.GradScaler("cpu", enabled=way == "scaled")
        for _ in range(30):
            (model if way == "model" else optimizer).zero_grad()
            loss = likelihood.nll(model(x), y)
            scaler.scale(-loss if way == "maximize" else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert likelihood.log_sigma is not None
        sigmas.append(likelihood.log_sigma.item())
    assert sigmas == pytest.approx([sigmas[0]] * 4, abs=1e-4) and sigmas[0] < math.log(2.0)


def test_the_originals_start_is_undone_where_the_first_step_fails() -> None:
    model = built("mlp")
    x, y = MODELS["mlp"][1](0)
    optimizer = ff.FishLeg(model, Categorical(), [(x, y)], sgd_lr=0.5, lr=0.05, pre_aux_training=2)
    state = optimizer.fishleg.state_dict()
    Categorical().nll(model(x), y).backward()
    model[0].bias.grad.fill_(math.nan)  # type: ignore[index, union-attr]
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert_same_state(state, optimizer.fishleg.state_dict())


def test_a_layer_that_was_parametrized_since_is_told() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index]
    Categorical().nll(model(randn(12, 4)), labels(12)).backward()
    with pytest.raises(RuntimeError, match="the model has changed"):
        optimizer.step()
