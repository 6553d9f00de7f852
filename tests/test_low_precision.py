"""Parameters in bfloat16 and float16: state in float32, each tensor rounded once, and the same training within that."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func._trees import descend_
from fishleg_func.likelihoods import Categorical

LABELS = torch.arange(24) % 3
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def cnn() -> nn.Module:
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 3))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(x)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: randn(24, 4).float()),
    "cnn": (cnn, lambda: randn(24, 1, 4, 4).float()),
    "attention": (Attending, lambda: torch.arange(24 * 5).square().view(24, 5) % 6),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name][0](), MODELS[name][1]()


def lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@HALVES
@pytest.mark.parametrize("name", MODELS)
def test_training_follows_float32_with_state_in_float32(name: str, dtype: torch.dtype) -> None:
    model, x = make(name)
    half = copy.deepcopy(model).to(dtype)
    step, low = ff.fishlegify(model, Categorical()), ff.fishlegify(half, Categorical())
    losses = [(float(step(x, LABELS)), float(low(lowered(x, dtype), LABELS))) for _ in range(30)]
    assert losses[-1][1] < losses[0][1] - 0.1
    assert all(b == pytest.approx(a, abs=0.05) for a, b in losses)
    state = {k: t.dtype for k, t in low._tensors().items()}
    assert set(state.values()) == {torch.float32, torch.int64}
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert low._runner.unhooked == step._runner.unhooked == frozenset()
    assert [r.capture for r in low.report().rows] == [r.capture for r in step.report().rows]


def test_the_loss_is_that_of_outputs_in_float32() -> None:
    model, x = make("mlp")
    model.to(torch.bfloat16)
    with torch.no_grad():
        expected = F.cross_entropy(model(x.bfloat16()).float(), LABELS)
    loss = ff.fishlegify(model, Categorical())(x.bfloat16(), LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


class Mixed(nn.Module):
    """A body of low precision between layers of float32."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.into, self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 8).to(low), nn.Linear(8, 3)
        self.low = low

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.into(x).tanh().to(self.low)).float().tanh())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_several_dtypes(low: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Mixed(low), randn(24, 4).float()
    step = ff.fishlegify(model, Categorical())
    losses = [float(step(x, LABELS)) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for p in model.into.parameters()} == {torch.float32}
    assert {p.dtype for p in model.body.parameters()} == {low}
    wide = torch.promote_types(low, torch.float32)
    assert {t.dtype for q in step.q.values() for t in q.parameters()} == {wide}
    assert step._runner.unhooked == frozenset()


@HALVES
def test_a_target_of_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    target, direction = randn(1000).to(dtype), randn(1000, seed=1).float()
    keep, rate = torch.tensor(0.999), torch.tensor(0.01)
    expected = (keep * target.float() - rate * direction).to(dtype)
    descend_(target, keep, direction, rate, None)
    assert torch.equal(target, expected)


@HALVES
def test_a_layer_whose_hook_does_not_tell_everything_is_still_found(dtype: torch.dtype) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x).tanh() + F.linear(x, self.fc.weight))

    torch.manual_seed(0)
    step = ff.fishlegify(Reads().to(dtype), Categorical())
    step(randn(24, 4).to(dtype), LABELS)
    assert step._runner.unhooked == {"fc"}


def test_finite_differences_need_digits() -> None:
    with pytest.raises(ValueError, match=r"fisher='antithetic' .*bfloat16.*fisher='exact'"):
        ff.fishlegify(mlp().bfloat16(), fisher="antithetic")
