"""Bad input raises an error that states value, requirement and remedy, and leaves everything as it was."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_transform import LABELS, changed, hooks_of, randn, snapshot
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

X = randn(12, 4)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 3))


def assert_raises_and_changes_nothing(
    model: nn.Module,
    step: ff.FishLegStep | None,
    call: Callable[[], Any],
    error: type[Exception],
    words: tuple[str, ...],
) -> None:
    before, hooks = snapshot(model, step), hooks_of(model)
    with pytest.raises(error) as raised:
        call()
    assert [w for w in words if w not in str(raised.value)] == [], str(raised.value)
    assert changed(before, snapshot(model, step)) == []
    assert hooks_of(model) == hooks


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"lr": 0.0}, ValueError, ("lr=0.0", "> 0", "use")),
    ({"lr": -1.0}, ValueError, ("lr=-1.0", "> 0", "use")),
    ({"lr": math.nan}, ValueError, ("lr=nan", "> 0", "use")),
    ({"lr": math.inf}, ValueError, ("lr=inf", "finite", "use")),
    ({"lr": "fast"}, TypeError, ("lr='fast'", "number")),
    ({"damping": 0.0}, ValueError, ("damping=0.0", "> 0", "1e-3")),
    ({"damping": -1.0}, ValueError, ("damping=-1.0", "> 0", "1e-3")),
    ({"damping": math.nan}, ValueError, ("damping=nan", "> 0")),
    ({"weight_decay": -0.1}, ValueError, ("weight_decay=-0.1", ">= 0", "use 0")),
    ({"beta": 1.0}, ValueError, ("beta=1.0", "< 1", "use 0.9")),
    ({"beta": -0.1}, ValueError, ("beta=-0.1", ">= 0", "use 0.9")),
    ({"aux_lr": 0.0}, ValueError, ("aux_lr=0.0", "> 0", "0.2")),
    ({"aux_lr": 1.0}, ValueError, ("aux_lr=1.0", "< 1", "0.2")),
    ({"aux_rule": "adam"}, ValueError, ("aux_lr=0.2", "< 0.1", "'adam'", "1e-3")),
    ({"aux_betas": (0.9, 1.0)}, ValueError, ("aux_betas[1]=1.0", "< 1", "0.999")),
    ({"aux_betas": (0.9,)}, ValueError, ("aux_betas=(0.9,)", "two", "0.999")),
    ({"aux_eps": 0.0}, ValueError, ("aux_eps=0.0", "> 0", "1e-8")),
    ({"update_aux_every": -3}, ValueError, ("update_aux_every=-3", ">= 0", "use 0")),
    ({"update_aux_every": 2.0}, ValueError, ("update_aux_every=2.0", "integer")),
    ({"update_aux_every": True}, ValueError, ("update_aux_every=True", "integer")),
    ({"aux_batch_size": 0}, ValueError, ("aux_batch_size=0", ">= 1", "None")),
    ({"aux_batch_size": 2.5}, ValueError, ("aux_batch_size=2.5", "integer")),
    ({"momentum": "nadam"}, ValueError, ("'nadam'", "'nesterov'", "'before'", "'after'")),
    ({"q": "shampoo"}, ValueError, ("'shampoo'", "'kfac'", "'diagonal'")),
    ({"q": 3}, ValueError, ("q=3", "kfac", "callable")),
    ({"q": {"0": "shampoo"}}, ValueError, ("'shampoo'", "'kfac'")),
    ({"fisher": "true"}, ValueError, ("'true'", "'exact'", "'antithetic'")),
    ({"u": "noise"}, ValueError, ("'noise'", "'gradient'", "'gaussian'")),
    ({"step_norm": "trust"}, ValueError, ("'trust'", "'layer'", "None")),
    ({"aux_rule": "sgd"}, ValueError, ("'sgd'", "'relative'", "'adam'")),
    ({"q": {"encoder*": "eigen", "0": "kfac", "x": "eigen"}}, ValueError, ("q", "'encoder*'", "'x'", "'0.weight'")),
    ({"include": ["0", "nope", "re:.*"]}, ValueError, ("include", "'nope'", "'re:.*'", "'0.weight'")),
    ({"exclude": "wrong"}, ValueError, ("exclude", "'wrong'", "'0.weight'")),
    ({"exclude": "*"}, ValueError, ("no parameter is left", "at least one", "excluded")),
    ({"likelihood": "categorical"}, TypeError, ("likelihood=", "nll", "sample", "Categorical()")),
    ({"likelihood": nn.Module()}, TypeError, ("likelihood=", "nll", "sample", "Categorical()")),
    ({"likelihood": Categorical}, TypeError, ("likelihood=", "instance", "Categorical()")),
]


@pytest.mark.parametrize(("options", "error", "words"), ARGUMENTS, ids=lambda v: str(v)[:40] if type(v) is dict else "")
def test_arguments(options: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    model = mlp()
    assert_raises_and_changes_nothing(model, None, lambda: ff.fishlegify(model, **options), error, words)


def frozen() -> nn.Module:
    return nn.Linear(4, 3).requires_grad_(False)


def complex_parameter() -> nn.Module:
    return nn.Linear(4, 3, dtype=torch.complex64)


def integer_parameter() -> nn.Module:
    model = nn.Linear(4, 3)
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    return model


MODELS: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    (nn.Tanh, ValueError, ("Tanh", "no parameters", "pass the module")),
    (frozen, ValueError, ("no parameter is left", "at least one", "frozen")),
    (complex_parameter, ValueError, ("'weight'", "torch.complex64", "must be", "exclude='weight'")),
]


@pytest.mark.parametrize(("make", "error", "words"), MODELS)
def test_models(make: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    model = make()
    assert_raises_and_changes_nothing(model, None, lambda: ff.fishlegify(model), error, words)


@pytest.mark.parametrize("candidate", [3, lambda x: x, nn.Linear, [nn.Linear(4, 3)]])
def test_what_is_not_a_module(candidate: Any) -> None:
    with pytest.raises(TypeError, match=r"model=.* must be a torch.nn.Module; pass the module"):
        ff.fishlegify(candidate)


def test_an_integer_parameter_cannot_be_trained_and_is_left_alone() -> None:
    model = integer_parameter()
    step = ff.fishlegify(model)
    step(X, LABELS)
    assert {r.parameter: r.treatment for r in step.report().rows}["codes"] == "frozen"
    assert torch.equal(model.codes, torch.arange(3))


Y = randn(12, 3, seed=1)
ONE_HOT = torch.eye(3)[LABELS]
TARGETS: list[tuple[Any, Any, type[Exception], tuple[str, ...]]] = [
    (Categorical(), Y, TypeError, ("torch.float32", "integer", "targets.long()")),
    (Categorical(), ONE_HOT, TypeError, ("torch.float32", "integer", "argmax(-1)")),
    (Categorical(), ONE_HOT.long(), ValueError, ("(12, 3)", "(12,)", "without the last dimension")),
    (Categorical(), LABELS.bool(), TypeError, ("torch.bool", "integer")),
    (Categorical(), LABELS + 1, ValueError, ("[1, 3]", "[0, 2]", "class numbers")),
    (Categorical(), LABELS - 1, ValueError, ("[-1, 1]", "[0, 2]", "ignore_index")),
    (Categorical(), LABELS[:7], ValueError, ("(7,)", "(12,)")),
    (Gaussian(), LABELS, ValueError, ("(12,)", "(12, 3)", "Categorical()")),
    (Gaussian(), Y[:, :1], ValueError, ("(12, 1)", "(12, 3)", "reshape")),
    (Bernoulli(), LABELS, ValueError, ("(12,)", "(12, 3)", "Bernoulli")),
    (Bernoulli(), Y, ValueError, ("must be in [0, 1]", "scale")),
    (Poisson(), Y, ValueError, ("must be in [0, inf]", "counts")),
    (None, LABELS[:7], ValueError, ("torch.int64", "(7,)", "(12, 3)", "Gaussian()", "Bernoulli()", "Poisson()")),
    (None, Y[:, 0], ValueError, ("torch.float32", "(12,)", "(12, 3)", "Categorical()")),
    (None, ONE_HOT.bool(), ValueError, ("torch.bool", "Bernoulli()")),
    (None, LABELS.to("meta"), ValueError, ("targets on meta", "cpu", ".to('cpu')")),
]


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
@pytest.mark.parametrize(("likelihood", "targets", "error", "words"), TARGETS)
def test_targets(likelihood: Any, targets: Tensor, error: type[Exception], words: tuple[str, ...], first: bool) -> None:
    model, twin = mlp(), mlp()
    step, good = ff.fishlegify(model, likelihood), ff.fishlegify(twin, likelihood)
    fine = LABELS if likelihood is None or isinstance(likelihood, Categorical) else Y.abs().clamp(0, 1)
    values_only = words[0].startswith(("[", "must be in"))  # values are looked at in the first batch only
    if not first and not values_only and likelihood is not None:
        torch.manual_seed(1)
        step(X, fine)
        torch.manual_seed(1)
        good(X, fine)
    for call in (step, step.natural_gradient):
        assert_raises_and_changes_nothing(model, step, lambda call=call: call(X, targets), error, words)
    for _ in range(2):
        torch.manual_seed(2)
        loss = step(X, fine)
        torch.manual_seed(2)
        assert torch.equal(loss, good(X, fine))
    assert changed(snapshot(twin, good), snapshot(model, step)) == []


class Returns(nn.Module):
    """A model that returns something else than logits."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(x))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda t: (t, t), ("tuple", "one tensor", "output=lambda")),
        (lambda t: {"logits": t}, ("dict", "one tensor", "output=lambda")),
        (lambda t: t.argmax(-1), ("torch.int64", "floating")),
        (lambda t: None, ("NoneType", "one tensor")),
    ],
)
def test_model_outputs(wrap: Callable[[Tensor], Any], words: tuple[str, ...]) -> None:
    model = Returns(wrap)
    step = ff.fishlegify(model)
    assert_raises_and_changes_nothing(model, step, lambda: step(X, LABELS), TypeError, words)


def test_inputs_on_another_device_are_all_named() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.fc(a + b)
            return out

    model = Sum()
    step = ff.fishlegify(model)
    far = X.to("meta")
    words = ("inputs[0] on meta", "inputs[1] on meta", "must be on cpu", ".to('cpu')")
    for inputs in ((far, far), {"a": far, "b": far}):
        assert_raises_and_changes_nothing(model, step, lambda i=inputs: step(i, LABELS), ValueError, words)
        assert_raises_and_changes_nothing(model, step, lambda i=inputs: step.accuracy(i), ValueError, words)


def test_calls_out_of_turn() -> None:
    model = mlp()
    step = ff.fishlegify(model, u="gradient")
    for call, words in (
        (lambda: step.update_aux(X), ("targets=None", "before the first step")),
        (lambda: step.accuracy(X), ("likelihood=None", "take one step")),
        (lambda: step.accuracy(X, n=0), ("n=0", ">= 1")),
    ):
        assert_raises_and_changes_nothing(model, step, call, ValueError, words)
    empirical = ff.fishlegify(mlp(), fisher="empirical", u="gaussian")
    empirical(X, LABELS)
    with pytest.raises(ValueError, match="targets=None must be given with fisher='empirical'"):
        empirical.update_aux(X)
    step.remove()
    for gone in (lambda: step(X, LABELS), lambda: step.update_aux(X, LABELS), lambda: step.accuracy(X)):
        assert_raises_and_changes_nothing(model, step, gone, RuntimeError, ("removed", "fishlegify"))


class Fragile(nn.Module):
    """Draws random numbers, and raises in its forward of number ``fuse``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.fuse = mlp(), nn.Linear(3, 3), math.inf

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.fuse -= 1
        if self.fuse == 0:
            raise ArithmeticError("the fuse blew")
        logits: Tensor = self.head(h)
        return logits


class FragileLikelihood(Categorical):
    """Raises when the Fisher of the outputs is asked for."""

    broken = False

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        if self.broken:
            raise ArithmeticError("no Fisher today")
        return super().fisher(outputs, tangent)


FAILING: dict[str, dict[str, Any]] = {
    "default": {},
    "antithetic": {"fisher": "antithetic"},
    "smaller auxiliary batch": {"aux_batch_size": 5},
    "adam": {"aux_rule": "adam", "aux_lr": 1e-3},
}


def assert_twins_agree(steps: list[ff.FishLegStep], n: int = 3) -> None:
    """Take steps with both, and compare everything to the last bit."""
    for seed in range(n):
        losses = []
        for step in steps:
            torch.manual_seed(seed)
            losses.append(step(X, LABELS))
        assert torch.equal(*losses)
    assert changed(*(snapshot(step.model, step) for step in steps)) == []


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("name", FAILING)
def test_an_exception_in_the_model_leaves_everything_as_it_was(name: str, taken: int) -> None:
    failures = 0
    for fuse in range(1, 9):  # the forward passes of one step, the last ones never reached
        model = Fragile()
        step = ff.fishlegify(model, Categorical(), **FAILING[name])
        for _ in range(taken):
            step(X, LABELS)
        before = snapshot(model, step)
        model.fuse = fuse
        try:
            step(X, LABELS)
        except ArithmeticError:
            failures += 1
            assert changed(before, snapshot(model, step)) == [], f"forward pass {fuse}"
    assert 0 < failures < 8


@pytest.mark.parametrize("name", FAILING)
def test_the_step_after_an_exception_is_that_of_a_twin_that_never_failed(name: str) -> None:
    for fuse in range(1, 4):
        models = [Fragile(), Fragile()]
        steps = [ff.fishlegify(model, Categorical(), **FAILING[name]) for model in models]
        assert_twins_agree(steps, fuse)
        models[0].fuse = fuse
        try:
            steps[0](X, LABELS)
        except ArithmeticError:
            models[0].fuse = math.inf
            assert_twins_agree(steps)


@pytest.mark.parametrize("call", ["update_aux", "natural_gradient", "accuracy"])
def test_an_exception_in_a_call_that_looks_leaves_everything_as_it_was(call: str) -> None:
    models = [Fragile(), Fragile()]
    steps = [ff.fishlegify(model, Categorical()) for model in models]
    assert_twins_agree(steps, 1)
    before = snapshot(models[0], steps[0])
    models[0].fuse = 1
    with pytest.raises(ArithmeticError):
        getattr(steps[0], call)(*((X,) if call == "accuracy" else (X, LABELS)))
    models[0].fuse = math.inf
    assert changed(before, snapshot(models[0], steps[0])) == []
    assert_twins_agree(steps)


def test_an_exception_in_the_likelihood_leaves_everything_as_it_was() -> None:
    steps = [ff.fishlegify(mlp(), FragileLikelihood()) for _ in range(2)]
    assert_twins_agree(steps, 1)
    before = snapshot(steps[0].model, steps[0])
    steps[0].likelihood.broken = True  # type: ignore[union-attr]
    with pytest.raises(ArithmeticError, match="no Fisher today"):
        steps[0](X, LABELS)
    steps[0].likelihood.broken = False  # type: ignore[union-attr]
    assert changed(before, snapshot(steps[0].model, steps[0])) == []
    assert_twins_agree(steps)
