"""A NaN or an infinity is refused before anything is changed, eager or compiled."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_transform import LABELS, changed, randn, snapshot
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian

X, Y = randn(12, 4).double(), randn(12, 3, seed=1).double()


class Rooted(nn.Module):
    """Batch norm, dropout, and a square root whose derivative is infinite at zero."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.drop, self.gain = nn.Dropout(dropout), nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.a(x)))
        logits: Tensor = self.b(h) + (self.gain.square() * x[:, :1].abs()).sqrt()
        return logits


class Small(nn.Module):
    """The same with fewer parameters and nothing random, for compiled steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc, self.gain = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3), nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(x)) + (self.gain.square() * x[:, :1].abs()).sqrt() * LABELS[:3].double()
        return logits


def with_value(value: float) -> Tensor:
    bad = X.clone()
    bad[3, 1] = value
    return bad


def zero_first() -> Tensor:
    bad = X.clone()
    bad[3, 0] = 0.0
    return bad


BAD: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "nan input": (lambda: (with_value(math.nan), LABELS), "loss=nan"),
    "infinite input": (lambda: (with_value(math.inf), LABELS), "loss=nan"),
    "huge input": (lambda: (X * 1e308, LABELS), "loss="),
    "gradient only": (lambda: (zero_first(), LABELS), "a gradient is NaN or Inf"),
}
bad_batches = pytest.mark.parametrize("name", BAD)


def take(step: Callable[..., Tensor], inputs: Any, targets: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return step(inputs, targets)


@bad_batches
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_an_eager_step_raises_before_anything_is_changed(name: str, taken: int) -> None:
    (bad, labels), words = BAD[name][0](), BAD[name][1]
    model, twin = Rooted(), Rooted()
    options: dict[str, Any] = {"update_aux_every": 2}
    step, good = (ff.fishlegify(m, Categorical(), **options) for m in (model, twin))
    for seed in range(taken):
        assert torch.equal(take(step, X, LABELS, seed), take(good, X, LABELS, seed))
    before = snapshot(model, step)
    with pytest.raises(FloatingPointError) as raised:
        step(bad, labels)
    assert words in str(raised.value) and "finite" in str(raised.value) and "nothing was changed" in str(raised.value)
    assert changed(before, snapshot(model, step)) == []
    for seed in range(5, 9):
        assert torch.equal(take(step, X, LABELS, seed), take(good, X, LABELS, seed))
    assert changed(snapshot(twin, good), snapshot(model, step)) == []


@pytest.mark.parametrize("u", ["gradient", "gaussian"])
def test_targets_that_are_not_finite_are_refused(u: str) -> None:
    model = Rooted()
    step = ff.fishlegify(model, Gaussian(), u=u)
    step(X, Y)
    before = snapshot(model, step)
    for value in (math.nan, math.inf, -math.inf):
        targets = Y.clone()
        targets[0, 0] = value
        for call in (step, step.natural_gradient, step.update_aux):
            with pytest.raises(FloatingPointError, match="must be finite"):
                call(X, targets)
    assert changed(before, snapshot(model, step)) == []


@pytest.mark.parametrize("u", ["gradient", "gaussian"])
def test_an_update_from_masked_targets_alone_is_refused(u: str) -> None:
    model = Rooted()
    step = ff.fishlegify(model, Categorical(), u=u)
    before = snapshot(model, step)
    with pytest.raises(FloatingPointError, match="must be finite"):
        step.update_aux(X, torch.full_like(LABELS, -100))
    assert changed(before, snapshot(model, step)) == []


@pytest.mark.parametrize("rows", [12, 100])  # a gradient kept as factors, and one formed
def test_a_gradient_that_overflows_only_as_a_product_is_seen(rows: int) -> None:
    model = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(model.weight)
    step = ff.fishlegify(model, Gaussian())
    before = snapshot(model, step)
    with pytest.raises(FloatingPointError, match="gradient"):  # of 1e40, at a loss of 8e20
        step(torch.full((rows, 16), 1e30), torch.full((rows, 16), 1e10))
    assert changed(before, snapshot(model, step)) == []


def test_a_first_batch_that_is_refused_does_not_blind_the_check_of_the_hooks() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.out(self.fc(x).tanh() + nn.functional.linear(x, self.fc.weight))
            return logits

    model = Functional()
    step = ff.fishlegify(model, Categorical())
    with pytest.raises(FloatingPointError):
        step(with_value(math.nan), LABELS)
    g = step.natural_gradient(X, LABELS)  # Q is the identity
    (truth,) = torch.autograd.grad(nn.functional.cross_entropy(model(X), LABELS), [model.fc.weight])
    torch.testing.assert_close(g["fc.weight"], truth)


def test_a_compiled_step_skips_what_is_not_finite() -> None:
    torch._dynamo.reset()
    model, twin = Small(), Small()
    step, good = (ff.fishlegify(m, Categorical(), update_aux_every=3) for m in (model, twin))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(1, 9):
        for name in ("nan input", "gradient only") if i in (1, 2, 5) else ():
            bad, labels = BAD[name][0]()
            before, skipped = snapshot(model, step), int(step.skipped)
            loss = compiled(bad, labels)
            assert int(step.skipped) == skipped + 1, "one more for each step that is skipped"
            assert loss.isfinite() == (name == "gradient only")
            assert changed(before, snapshot(model, step)) == []
            before = snapshot(twin, good)
            with pytest.raises(FloatingPointError):
                good(bad, labels)
            assert changed(before, snapshot(twin, good)) == []
        skipped = int(step.skipped)
        loss = compiled(X, LABELS)
        assert loss.isfinite() and int(step.skipped) == skipped
        assert all(p.isfinite().all() for p in model.parameters())
    losses = [float(compiled(X, LABELS)) for _ in range(3)]
    assert losses[-1] < losses[0]


def test_a_step_after_a_skipped_one_is_that_of_a_twin_without_the_bad_batch() -> None:
    # nothing here draws random numbers or counts steps: no basis, and no update of λ
    torch._dynamo.reset()
    model, twin = Small(), Small()
    options: dict[str, Any] = {"q": {"*": "kronecker"}, "update_aux_every": 0}
    step, good = (ff.fishlegify(m, Categorical(), **options) for m in (model, twin))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(X, LABELS)
        compiled(with_value(math.nan), LABELS)
        good(X, LABELS)
    assert int(step.skipped) == 2
    torch.testing.assert_close(compiled(X, LABELS), good(X, LABELS), rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


class Broken(Categorical):
    """Its Fisher is NaN while its loss and gradient are finite."""

    broken = True

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        product = super().fisher(outputs, tangent)
        return product * math.nan if self.broken else product


def lambdas(step: ff.FishLegStep) -> dict[str, Tensor]:
    return {f"{k}.{n}": p.detach().clone() for k, q in step.q.items() for n, p in q.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"aux_rule": "adam", "aux_lr": 1e-3}], ids=["relative", "adam"])
def test_a_fisher_product_that_is_not_finite_leaves_lambda_and_the_step_goes_on(options: dict[str, Any]) -> None:
    model = Rooted(dropout=0.0)
    step = ff.fishlegify(model, Broken(), **options)
    before, lam = snapshot(model), lambdas(step)
    with pytest.warns(UserWarning, match=r"not finite.*damping"):
        loss = step(X, LABELS)
    assert loss.isfinite() and int(step.skipped) == 1
    assert changed(lam, lambdas(step)) == []
    moved = set(changed(before, snapshot(model)))
    assert {f"model.{name}" for name, _ in model.named_parameters()} <= moved
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.warns(UserWarning, match="not finite"):
        assert not step.update_aux(X, LABELS).isfinite()
    assert changed(lam, lambdas(step)) == []
    step.likelihood.broken = False  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(X, LABELS)
    assert set(changed(lam, lambdas(step))) == lam.keys()
    assert all(t.isfinite().all() for t in lambdas(step).values())


def test_a_compiled_fisher_product_that_is_not_finite_leaves_lambda() -> None:
    torch._dynamo.reset()
    model = Small()
    step = ff.fishlegify(model, Broken())
    before, lam = snapshot(model), lambdas(step)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(X, LABELS)
    assert loss.isfinite() and int(step.skipped) == 1
    assert changed(lam, lambdas(step)) == []
    assert {f"model.{name}" for name, _ in model.named_parameters()} <= set(changed(before, snapshot(model)))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rule", ["nesterov", "before", "after"])
@pytest.mark.parametrize("at", [0, 1, 10, 11, 13, 20, 21])
def test_a_direction_without_a_norm_is_refused_whenever_it_comes(at: int, rule: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = ff.FishLeg(model, Categorical(), momentum=rule)

    def step(factor: float = 1.0) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.float()), LABELS).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(factor)
        optimizer.step()

    for _ in range(at):
        step()
    before = snapshot(model, optimizer.fishleg)
    with pytest.raises(FloatingPointError, match="norm of the direction Q m is NaN or Inf and must be finite"):
        step(1e25)
    assert [name for name in changed(before, snapshot(model, optimizer.fishleg)) if "grad" not in name] == []
    for _ in range(12):
        step()
    assert optimizer.fishleg.steps == at + 12
    assert all(math.isfinite(x) for x in optimizer.fishleg.statistics().values())


@pytest.mark.parametrize("at", [0, 11, 20])
def test_a_compiled_step_skips_a_direction_without_a_norm_and_goes_on(at: int) -> None:
    torch._dynamo.reset()
    model = nn.Linear(4, 3)
    step = ff.fishlegify(model, Gaussian(1e12), damping=1e-26)  # Q is large, the loss small
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, y = X.float(), Y.float()
    for i in range(26):
        kept = model.weight.detach().clone()
        loss = compiled(x, y + 1e25 if i == at else y)
        assert loss.isfinite()
        assert torch.equal(kept, model.weight) == (i == at)
    assert int(step.skipped) == 1


@pytest.mark.parametrize("rule", ["nesterov", "before", "after"])
def test_a_direction_too_small_to_be_inverted_moves_nothing(rule: str) -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.faint = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(x) + self.faint * 1e-41
            return logits

    model = Faint()
    step = ff.fishlegify(model, Gaussian(), momentum=rule, weight_decay=0.0)
    for _ in range(12):
        step(X.float(), Y.float())
    assert model.faint == 1 and model.fc.weight.isfinite().all()


def test_a_predicted_change_that_overflows_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    step = ff.fishlegify(model, Gaussian(), step_norm="kl")
    step(X.float(), Y.float())
    before = snapshot(model)
    monkeypatch.setattr(step._averages, "predicted", lambda g, p: {k: torch.tensor(math.nan) for k in p})
    step(X.float(), Y.float())
    assert changed(before, snapshot(model)) == []
