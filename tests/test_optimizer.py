"""The optimizer front end takes the steps of the step function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator, randn
from loops import MODELS, built, labels, optimizer_of, parameters, train
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"u": "momentum", "momentum": "before", "step_norm": "kl"},
    "gaussian": {"u": "gaussian", "step_norm": None, "lr": 1e-2, "damping": 0.1},
    "after": {"momentum": "after", "update_aux_every": 3},
    "part": {"aux_batch_size": 4, "weight_decay": 0.1},
    "adam": {"aux_rule": "adam", "aux_lr": 1e-3, "q": "kronecker"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_it_takes_the_steps_of_the_step_function(name: str, options: str) -> None:
    mine, other = built(name), built(name)
    if options == "part":  # is run apart from the whole batch, with dropout of its own
        for m in (*mine.modules(), *other.modules()):
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    optimizer = optimizer_of(mine, **OPTIONS[options])
    count = 12 if options == "adam" else 20  # the sign of a gradient that is rounding error moves λ as far as any
    losses = train(optimizer, mine, name, range(count))
    step = ff.fishlegify(other, Categorical(), generator=generator(3), **OPTIONS[options])
    for i, loss in enumerate(losses):
        torch.manual_seed(i)
        assert abs(step(*MODELS[name][1](i)).item() - loss) <= 1e-6
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6
    for (k, a), b in zip(mine.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a, b), k
    assert (parameters(mine) - parameters(built(name))).abs().max() > 1e-2


def test_long_layers_are_probed_by_rows_as_in_the_step_function() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(130, 140), nn.Tanh(), nn.Linear(140, 3)).double()

    x, y = randn(40, 130), labels(40)
    mine, other = build(), build()
    optimizer = optimizer_of(mine)
    step = ff.fishlegify(other, Categorical(), generator=generator(3))
    for _ in range(12):
        optimizer.zero_grad()
        Categorical().nll(mine(x), y).backward()
        optimizer.step()
        step(x, y)
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6


def test_gradients_are_the_truth_and_are_only_read() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    train(optimizer, model, "mlp", range(2))
    x, y = MODELS["mlp"][1](3)
    optimizer.zero_grad()
    Categorical().nll(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    fresh = built("mlp")
    optimizer, before = optimizer_of(fresh, weight_decay=0.0), parameters(fresh)
    Categorical().nll(fresh(x), y).backward()
    for p in fresh.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(before, parameters(fresh))  # what the batch's own gradient is does not matter


@pytest.mark.parametrize("options", [{}, {"update_aux_every": 2}, {"u": "gaussian"}])
def test_four_micro_batches_are_one_large_batch(options: dict[str, Any]) -> None:
    whole, parts = built("mlp"), built("mlp")
    one, four = optimizer_of(whole, **options), optimizer_of(parts, **options)
    train(one, whole, "mlp", range(12))
    for i in range(12):
        x, y = MODELS["mlp"][1](i)
        four.zero_grad()
        for j in range(4):
            (Categorical().nll(parts(x[3 * j : 3 * j + 3]), y[3 * j : 3 * j + 3]) / 4).backward()
        four.step()
    assert (parameters(whole) - parameters(parts)).abs().max() <= 1e-6


def test_masked_tokens_are_seen_from_the_loss() -> None:
    mine, other = built("transformer"), built("transformer")
    optimizer, step = optimizer_of(mine), ff.fishlegify(other, Categorical(), generator=generator(3))
    for i in range(12):
        x, y = MODELS["transformer"][1](i)
        y[:, 3:] = -100
        optimizer.zero_grad()
        Categorical().nll(mine(x), y).backward()
        optimizer.step()
        step(x, y)
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    mine, other = built("mlp"), built("mlp")
    optimizer, plain = optimizer_of(mine), optimizer_of(other)
    expected = train(plain, other, "mlp", range(12))

    def closure(i: int) -> Tensor:
        optimizer.zero_grad()
        x, y = MODELS["mlp"][1](i)
        loss = Categorical().nll(mine(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(lambda i=i: closure(i)).item() for i in range(12)]
    assert losses == expected and torch.equal(parameters(mine), parameters(other))


def test_zero_grad_between_forward_and_backward_keeps_the_batch() -> None:
    mine, other = built("mlp"), built("mlp")
    optimizer, plain = optimizer_of(mine), optimizer_of(other)
    train(plain, other, "mlp", range(12))
    for i in range(12):
        x, y = MODELS["mlp"][1](i)
        loss = Categorical().nll(mine(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(parameters(mine), parameters(other))


def test_evaluation_between_steps_changes_nothing() -> None:
    mine, other = built("cnn"), built("cnn")
    optimizer, plain = optimizer_of(mine), optimizer_of(other)
    train(plain, other, "cnn", range(12))
    for i in range(12):
        train(optimizer, mine, "cnn", range(i, i + 1))
        mine.eval()
        mine(randn(5, 1, 6, 6))  # with gradients, and never differentiated
        optimizer.fishleg.accuracy(randn(5, 1, 6, 6), 1)
        ff.fisher_vector_product(mine, Categorical(), randn(5, 1, 6, 6), {"5.bias": torch.ones(3).double()})
        mine.train()
    assert torch.equal(parameters(mine), parameters(other))


def test_sigma_is_learned_in_both_front_ends() -> None:
    x = randn(50, 4)
    y = x @ randn(4, 3, seed=1) + 0.2 * randn(50, 3, seed=2)
    sigmas = []
    for front in ("step", "optimizer"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        likelihood = Gaussian(1.0, learn_sigma=True)
        if front == "step":
            step = ff.fishlegify(model, likelihood, weight_decay=0.0, u="gradient", generator=generator(3))
            for _ in range(300):
                step(x, y)
        else:
            optimizer = optimizer_of(model, likelihood, weight_decay=0.0, u="gradient")
            for _ in range(300):
                optimizer.zero_grad()
                likelihood.nll(model(x), y).backward()
                optimizer.step()
        residual = (model(x) - y).square().mean().sqrt().item()
        sigmas.append(float(next(iter(likelihood.tensors().values())).detach().exp().mean()))
        assert sigmas[-1] == pytest.approx(residual, rel=0.05)
    assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-5)


CLASSES = ff.likelihoods.Categorical(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("likelihood", "settings", "decay"),
    [
        (CLASSES, {}, 0.06),
        (CLASSES, {"step_norm": "kl"}, 0.0),
        (CLASSES, {"step_norm": None}, 0.0),
        *((likelihood(), {}, 0.0) for likelihood in (ff.likelihoods.Gaussian, ff.likelihoods.Bernoulli)),
    ],
)
def test_weight_decay_by_default_is_for_classes(likelihood: Any, settings: dict[str, Any], decay: float) -> None:
    for given, expected in (({}, decay), ({"weight_decay": None}, decay), ({"weight_decay": 0.5}, 0.5)):
        step = ff.fishlegify(nn.Linear(3, 2).double(), likelihood, **settings, **given)
        optimizer = ff.FishLeg(nn.Linear(3, 2).double(), likelihood, **settings, **given)
        assert step.hyper.weight_decay == optimizer.param_groups[0]["weight_decay"] == expected


@pytest.mark.parametrize("call", ["step", "compiled", "update_aux", "natural_gradient"])
def test_weight_decay_by_default_follows_the_targets(call: str) -> None:
    torch.manual_seed(0)
    x, labels, reals = torch.randn(8, 3), torch.randint(2, (8,)), torch.randn(8, 2)
    for targets, likelihood, decay in (
        (labels, ff.likelihoods.Categorical(), 0.06),
        (reals, ff.likelihoods.Gaussian(), 0.0),
    ):
        trained = []
        for given in (likelihood, None):
            torch._dynamo.reset()  # of graphs there may be a few only
            torch.manual_seed(1)
            model = nn.Linear(3, 2)
            step = ff.fishlegify(model, given)
            assert given is not None or step.hyper.weight_decay.isnan()
            compiled = torch.compile(step, fullgraph=True, backend="eager") if call == "compiled" else step
            getattr(compiled, call, compiled)(x, targets)
            step(x, targets)
            assert step.hyper.weight_decay == pytest.approx(decay)
            trained.append(model.weight)
        assert torch.equal(*trained)


def test_weight_decay_that_was_given_stays() -> None:
    x, labels = torch.randn(8, 3), torch.randint(2, (8,))
    for decay in (0.0, 0.25):
        step = ff.fishlegify(nn.Linear(3, 2))
        for refused in (lambda: step(x / 0, labels), lambda: step.update_aux(1e25 * x, labels)):  # noqa: B023
            with pytest.raises(FloatingPointError):
                refused()
            assert step.hyper.weight_decay.isnan() and step.likelihood is None  # as it was
        step.hyper.weight_decay.fill_(decay)
        step(x, labels)
        given = ff.fishlegify(nn.Linear(3, 2), weight_decay=decay)
        given(x, labels)
        again = ff.fishlegify(nn.Linear(3, 2))
        again.load_state_dict(step.state_dict())
        again(x, labels)
        assert step.hyper.weight_decay == given.hyper.weight_decay == again.hyper.weight_decay == decay


def test_a_state_from_before_the_likelihood_was_known() -> None:
    x, labels = torch.randn(8, 3), torch.randint(2, (8,))
    state = ff.fishlegify(nn.Linear(3, 2)).state_dict()
    for likelihood in (None, ff.likelihoods.Categorical()):
        step = ff.fishlegify(nn.Linear(3, 2), likelihood)
        step.load_state_dict(state)
        step(x, labels)
        assert step.hyper.weight_decay == pytest.approx(0.06)
    several = ff.fishlegify(nn.Linear(3, 2))
    several.regroup(2, {"weight": 1, "bias": 0})
    several(x, labels)
    assert [hyper.weight_decay.item() for hyper in several.hypers] == pytest.approx([0.06, 0.06])
