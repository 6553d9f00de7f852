"""Every parameter is trained or named, with the right gradient, whatever the model and however it is called."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transform import LABELS, changed, randn, snapshot
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian


class Pooled(nn.Module):
    """Something over sequences, then the mean over time and a linear layer."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head, self.call = inner, nn.Linear(4, 3), call

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.call(self.inner, x).mean(1))
        return logits


class Bare(nn.Module):
    """Parameters outside of layers, one of them 0-d."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.fc(x)) * self.scale + self.shift)
        return logits


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Functional(nn.Module):
    """A layer whose weight is used apart from the layer too."""

    def __init__(self, smallest: int = 0) -> None:
        super().__init__()
        self.fc, self.out, self.smallest = nn.Linear(4, 4), nn.Linear(4, 3), smallest

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x))
        logits: Tensor = self.out(h + F.linear(x, self.fc.weight) if len(x) >= self.smallest else h)
        return logits


class Switch(nn.Module):
    """A layer that is called or not; ``on`` is data, a constant, or chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.on = nn.Linear(4, 4), nn.Linear(4, 3), True

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(x + self.a(x).tanh() if self.on else x)
        return logits


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dead = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


def mlp(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5, **options), nn.Tanh(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def norms() -> nn.Module:
    plain = [nn.LayerNorm(6, elementwise_affine=False), nn.BatchNorm1d(6, affine=False), nn.RMSNorm(6)]
    return nn.Sequential(nn.Linear(4, 6), *plain, nn.LayerNorm(6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3))


def cnn() -> nn.Module:
    body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False)]
    return nn.Sequential(*body, nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))


def attention(m: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = m(x, x, x)[0]
    return out


def encoder() -> nn.Module:
    return Pooled(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), lambda m, x: m(x))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: randn(12, 4)),
    "cnn": (cnn, lambda: randn(12, 2, 6, 6)),
    "norms": (norms, lambda: randn(12, 4)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        lambda: randn(12, 2, 5),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        lambda: randn(12, 1, 4, 4, 4),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(20, 3)),
        lambda: torch.arange(60).square().view(12, 5) % 3,
    ),
    "bare parameters": (Bare, lambda: randn(12, 4)),
    "attention": (lambda: Pooled(nn.MultiheadAttention(4, 2, batch_first=True), attention), lambda: randn(12, 5, 4)),
    "encoder": (encoder, lambda: randn(12, 5, 4)),
    "lstm": (lambda: Pooled(nn.LSTM(4, 4, batch_first=True), lambda m, x: m(x)[0]), lambda: randn(12, 5, 4)),
    "gru": (lambda: Pooled(nn.GRU(4, 4, batch_first=True), lambda m, x: m(x)[0]), lambda: randn(12, 5, 4)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        lambda: randn(12, 4),
    ),
    "subclass": (lambda: nn.Sequential(Doubled(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: randn(12, 4)),
    "root layer": (lambda: nn.Linear(4, 3), lambda: randn(12, 4)),
    "frozen": (frozen, lambda: randn(12, 4)),
    "unused": (Unused, lambda: randn(12, 4)),
    "functional": (Functional, lambda: randn(12, 4)),
    "twice": (lambda: nn.Sequential(layer := nn.Linear(4, 4), nn.Tanh(), layer, nn.Linear(4, 3)), lambda: randn(12, 4)),
}
zoo = pytest.mark.parametrize("name", ZOO)


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ZOO[name][0](), ZOO[name][1]()


def gradient(model: nn.Module, *args: Any, labels: Tensor = LABELS, **kwargs: Any) -> dict[str, Tensor]:
    """Return autograd's gradient of the cross entropy, zero where a parameter is not used."""
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    loss = F.cross_entropy(model(*args, **kwargs), labels)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), found, strict=True)}


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], msg=lambda m, name=name: f"{name}: {m}")
    assert any(t.norm() > 0 for t in truth.values())


@zoo
def test_every_parameter_is_reported_once_and_trained(name: str) -> None:
    model, x = make(name)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    step = ff.fishlegify(model, weight_decay=0.0)
    losses = [float(step(x, LABELS)) for _ in range(9)]  # an odd number: a scalar goes to and fro by equal steps
    rows = step.report().rows
    assert [r.parameter for r in rows] == list(before)
    assert all(r.parameter in str(step.report()) for r in rows)
    assert {r.block for r in rows} - {""} == step.q.keys()
    still = {k for k, p in model.named_parameters() if not p.requires_grad or k.startswith("dead.")}
    assert still == set(before) - set(changed(before, dict(model.named_parameters())))
    assert [r.treatment for r in rows if before[r.parameter].shape != r.shape] == []
    assert {r.parameter for r in rows if r.treatment == "frozen"} == still - {"dead.weight", "dead.bias"}
    assert losses[-1] < losses[0] - 0.01
    with torch.no_grad():
        assert F.cross_entropy(model(x), LABELS) < losses[0]


@zoo
def test_the_gradient_is_autograd_s(name: str) -> None:
    model, x = make(name)
    step = ff.fishlegify(model)
    assert_same(step.natural_gradient(x, LABELS), gradient(model, x))  # Q is the identity before the first step


def test_capture_is_reported_as_it_is() -> None:
    model, x = make("attention")
    step = ff.fishlegify(model)
    step(x, LABELS)
    captures = {r.parameter: r.capture for r in step.report().rows}
    # attention reads the weights of its output projection without calling it
    assert captures.pop("head.weight") == captures.pop("head.bias") == "rows"
    assert set(captures.values()) == {"autograd"}


def test_a_weight_that_is_also_used_functionally_is_found_at_the_first_step() -> None:
    model, x = make("functional")
    step = ff.fishlegify(model, step_norm=None, update_aux_every=0, q="kronecker", lr=0.5, beta=0.0)
    before, truth = dict(model.named_parameters()), gradient(model, x)
    before = {k: p.detach().clone() for k, p in before.items()}
    step(x, LABELS)
    captures = {r.block: r.capture for r in step.report().rows}
    assert captures == {"fc": "autograd", "out": "rows"}
    assert_same({k: (before[k] - p.detach()) / 0.5 for k, p in model.named_parameters()}, truth)  # Q = I: plain SGD


def test_a_functional_use_that_only_larger_batches_have_is_found() -> None:
    torch.manual_seed(0)
    model, x = Functional(smallest=8), randn(12, 4)
    step = ff.fishlegify(model)
    assert_same(step.natural_gradient(x[:4], LABELS[:4]), gradient(model, x[:4], labels=LABELS[:4]))
    assert_same(step.natural_gradient(x, LABELS), gradient(model, x))


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_is_called_now_and_then_has_the_right_gradient(first: bool) -> None:
    torch.manual_seed(0)
    model, x = Switch(), randn(12, 4)
    step = ff.fishlegify(model)
    for on in (first, not first, first):
        model.on = on
        assert_same(step.natural_gradient(x, LABELS), gradient(model, x))


def test_the_model_may_take_keywords_or_a_tuple_and_return_an_object() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, gain: Tensor, *, flip: bool = False) -> SimpleNamespace:
            h = self.a(input=x).tanh() * gain
            return SimpleNamespace(logits=self.b(-h if flip else h))

    def make_step() -> tuple[nn.Module, ff.FishLegStep]:
        torch.manual_seed(0)
        model = Pair()
        return model, ff.fishlegify(model, output=lambda o: o.logits)

    x, gain = randn(12, 4), randn(12, 5, seed=1)
    losses, gradients = [], []
    for inputs in ((x, gain), {"x": x, "gain": gain}, {"gain": gain, "x": x, "flip": False}):
        model, step = make_step()
        gradients.append(step.natural_gradient(inputs, LABELS))
        losses.append([float(step(inputs, LABELS)) for _ in range(4)])
        assert losses[-1][-1] < losses[-1][0]
    assert losses[0] == losses[1] == losses[2]
    model, step = make_step()
    logits = model(x, gain).logits
    truth = torch.autograd.grad(F.cross_entropy(logits, LABELS), list(model.parameters()))
    assert_same(gradients[0], {k: t for (k, _), t in zip(model.named_parameters(), truth, strict=True)})
    flipped = step.natural_gradient({"x": x, "gain": gain, "flip": True}, LABELS)
    assert not torch.equal(flipped["a.weight"], gradients[0]["a.weight"])


def test_the_likelihood_is_resolved_from_the_first_targets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fishleg_func")
    x = randn(12, 4)
    for targets, expected in ((LABELS, Categorical), (randn(12, 3, seed=2), Gaussian)):
        caplog.clear()
        step = ff.fishlegify(mlp())
        assert step.likelihood is None and "first targets" in str(step.report()) and not caplog.records
        with pytest.raises(ValueError, match="likelihood"):
            step.accuracy(x)
        loss = step(x, targets)
        step(x, targets)
        assert isinstance(step.likelihood, expected) and loss.isfinite()
        assert [repr(step.likelihood) in r.getMessage() for r in caplog.records] == [True]
        assert step.report().likelihood == repr(step.likelihood)
        assert repr(step.likelihood) in str(step.report())
    caplog.clear()
    ff.fishlegify(mlp(), Categorical())(x, LABELS)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"include": "0"}, {"0.weight", "0.bias"}),
        ({"include": ["0.w*", "2"]}, {"0.weight", "2.weight", "2.bias"}),
        ({"exclude": "*.bias"}, {"0.weight", "2.weight"}),
        ({"include": "?", "exclude": ["0.bias"]}, {"0.weight", "2.weight", "2.bias"}),
        ({"include": "[!0].weight"}, {"2.weight"}),
    ],
)
def test_patterns_choose_what_is_trained(options: dict[str, Any], trained: set[str]) -> None:
    model, x = make("mlp")
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    step = ff.fishlegify(model, **options)
    losses = [float(step(x, LABELS)) for _ in range(3)]
    assert set(changed(before, dict(model.named_parameters()))) == trained
    rows = {r.parameter: r.treatment for r in step.report().rows}
    assert {k for k, t in rows.items() if t not in ("excluded", "not included")} == trained
    assert losses[-1] < losses[0]


def test_the_first_pattern_that_matches_gives_the_family() -> None:
    def mine(shape: tuple[int, ...], **options: Any) -> ff.QModule:
        return ff.qmodules.Dense(shape, **options)

    model = nn.Sequential(mlp(), nn.LayerNorm(3), nn.Linear(3, 3))
    step = ff.fishlegify(model, q={"0.0": "eigen", "0.*": mine, "1.weight": "dense", "?": "kronecker"})
    families = {name: type(q).__name__ for name, q in step.q.items()}
    expected = {"0.0": "Eigen", "0.2": "Dense", "2": "Kronecker", "1": "Dense"}
    assert families == expected
    assert {r.block: r.treatment for r in step.report().rows}["0.2"] == "mine"
    assert all(isinstance(q, ff.QModule) for q in step.q.values())
    everywhere = ff.fishlegify(mlp(), q=mine)
    assert {type(q) for q in everywhere.q.values()} == {ff.qmodules.Dense}
    partly = ff.fishlegify(mlp(), q={"2": "eigen"})  # the rest keeps the default
    assert {k: type(q).__name__ for k, q in partly.q.items()} == {"0": "KFAC", "2": "Eigen"}
    assert ff.fishlegify(nn.Linear(4, 3)).q.keys() == {"(root)"}


def test_hyperparameters_take_effect_at_the_next_step() -> None:
    def moves(lr: float, weight_decay: float, damping: float) -> Tensor:
        model, x = make("mlp")
        step = ff.fishlegify(model)
        step(x, LABELS)
        step.hyper.lr.fill_(lr)
        step.hyper.weight_decay.fill_(weight_decay)
        step.hyper.damping.fill_(damping)
        before = model[0].weight.detach().clone()
        step(x, LABELS)
        return model[0].weight.detach() - before

    plain = moves(2e-2, 0.0, 3e-3)
    torch.testing.assert_close(moves(4e-2, 0.0, 3e-3), 2 * plain, rtol=1e-4, atol=1e-6)
    assert torch.count_nonzero(moves(0.0, 0.0, 3e-3)) == 0
    assert not torch.allclose(moves(2e-2, 0.0, 1.0), plain, rtol=1e-2)
    model, x = make("mlp")
    ff.fishlegify(model)(x, LABELS)
    torch.testing.assert_close(moves(2e-2, 0.5, 3e-3) - plain, -1e-2 * model[0].weight.detach())


def test_modes_and_batch_sizes_may_change_between_calls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    x = randn(12, 4)
    step = ff.fishlegify(model, q={"*": "kronecker"}, update_aux_every=0)  # Q stays the identity
    for training in (True, False, True):
        model.train(training)
        for n in (12, 5, 7, 12):
            truth = gradient(model, x[:n], labels=LABELS[:n])
            assert_same(step.natural_gradient(x[:n], LABELS[:n]), truth)
            step(x[:n], LABELS[:n])
            assert model.training == training


class Loop(nn.Module):
    """A layer that is called ``n`` times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head, self.n = nn.Linear(4, 4), nn.Linear(4, 3), 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n):
            x = self.cell(x).tanh()
        logits: Tensor = self.head(x)
        return logits


def test_the_number_of_calls_of_a_layer_may_fall_and_a_rise_is_right_or_an_error() -> None:
    torch.manual_seed(0)
    model, x = Loop(), randn(12, 4)
    step = ff.fishlegify(model)
    for n in (2, 1, 2):
        model.n = n
        assert_same(step.natural_gradient(x, LABELS), gradient(model, x))
    model.n = 3
    before = snapshot(model, step)
    try:
        assert_same(step.natural_gradient(x, LABELS), gradient(model, x))
    except RuntimeError as error:
        assert "'cell'" in str(error) and "exclude='cell'" in str(error)
    assert changed(before, snapshot(model, step)) == []
