"""Parameters in bfloat16 and float16: state in float32, each tensor rounded once, and the same training within that.

After training: systems with the Fisher, and pruning, are those of the same parameters in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, generator, randn
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
    assert all(b == pytest.approx(a, abs=0.1) for a, b in losses)
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


# --- operators and pruning ---


def coarse(x: Tensor) -> Tensor:
    """Round to what both dtypes hold."""
    return lowered(lowered(x, torch.bfloat16), torch.float16)


def halves(n: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Return two batches for the MLP."""
    x = coarse(randn(n, 4))
    return [(x[:10], LABELS[:10]), (x[10:], LABELS[10:])]


def in_dtype(batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(lowered(x, dtype), y) for x, y in batches]


@HALVES
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_fisher_is_that_of_the_same_parameters_in_float64(name: str, keep: bool, dtype: torch.dtype) -> None:
    model, x = make(name)
    low = model.to(dtype).eval()
    wide, x = copy.deepcopy(low).double(), coarse(x)
    state = {k: t.clone() for k, t in low.state_dict().items()}
    op = ff.FisherOperator(low, Categorical(), [(lowered(x, dtype), LABELS)], damping=1e-3, keep=keep)
    exact = ff.FisherOperator(wide, Categorical(), [(lowered(x, torch.float64), LABELS)], damping=1e-3)
    v = randn(op.shape[0])
    assert (op.dtype, (op @ v.float()).dtype) == (torch.float32, torch.float32)
    assert float((op @ v - exact @ v).norm()) < 1e-5 * float((exact @ v).norm())
    assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in low.state_dict().items())


@HALVES
def test_solve_converges(dtype: torch.dtype) -> None:
    low, _ = make("mlp")
    low.to(dtype)
    wide, batches = copy.deepcopy(low).double(), in_dtype(halves(), dtype)
    op = ff.FisherOperator(low, Categorical(), batches, damping=0.03)
    exact = ff.FisherOperator(wide, Categorical(), in_dtype(halves(), torch.float64), damping=0.03)
    b = randn(op.shape[0]).to(dtype)
    q = ff.estimate_inverse_fisher(low, Categorical(), batches, damping=0.03, updates=20)
    for solution in (op.solve(b), op.solve(op.unflatten(b)), op.solve(b, preconditioner=q)):
        x = solution.x if isinstance(solution.x, Tensor) else op.flatten(solution.x)
        assert solution.converged and solution.residual <= 1e-5
        assert x.dtype == torch.float32
        assert float((exact @ x.double() - b.double()).norm()) <= 2e-5 * float(b.double().norm())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_fisher_of_a_model_that_casts_by_itself(low: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Mixed(low), randn(24, 4).float()
    wide = Mixed(torch.float64)
    wide.load_state_dict(model.state_dict())
    wide.double().head.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    op = ff.FisherOperator(model, Categorical(), [(x, LABELS)], damping=1e-3)
    exact = ff.FisherOperator(wide, Categorical(), [(x.double(), LABELS)], damping=1e-3)
    v = randn(op.shape[0])
    assert float((op @ v - exact @ v).norm()) < 1e-5 * float((exact @ v).norm())


def test_what_a_model_makes_in_low_precision_by_itself_is_widened_too() -> None:
    constant = torch.full((4,), 0.5, dtype=torch.bfloat16)

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            padded = torch.zeros(len(x), 4, dtype=torch.bfloat16)
            padded[:, :2] = x.bfloat16() / 3
            assert constant.dtype == padded.dtype == x.dtype == self.fc.weight.dtype == torch.float32
            return self.fc(padded.add_(constant))

    torch.manual_seed(0)
    x, model = randn(24, 2).bfloat16(), Makes().bfloat16()
    op = ff.FisherOperator(model, Categorical(), [(x, LABELS)])
    same = nn.Sequential(model.fc)
    features = torch.cat([x.double() / 3, 0 * x.double()], 1) + 0.5
    expected = ff.FisherOperator(copy.deepcopy(same).double(), Categorical(), [(features, LABELS)])
    assert_close(op.dense().double(), expected.dense(), 1e-5)
    with pytest.raises(AssertionError):
        model(x)


@HALVES
def test_products_with_q_are_in_float32(dtype: torch.dtype) -> None:
    model, _ = make("mlp")
    q = ff.estimate_inverse_fisher(model.to(dtype), Categorical(), in_dtype(halves(), dtype), damping=0.1, updates=20)
    v = randn(q.shape[0]).float()
    expected = torch.cat([p.flatten() for p in (q.to(dtype=torch.float32) @ q.unflatten(v)).values()])
    assert torch.equal(q @ v, expected)
    assert {t.dtype for t in q.diagonal().values()} == {torch.float32}
    assert (q @ v.to(dtype)).dtype == dtype


@HALVES
@pytest.mark.parametrize("kind", ["learned", "blocks", "empirical", "magnitude"])
def test_pruning_is_that_of_float32_rounded_once(kind: str, dtype: torch.dtype) -> None:
    low, _ = make("mlp")
    low.to(dtype)
    wide = copy.deepcopy(low).float()

    def inverse(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> ff.InverseFisher | ff.pruning.BlockInverse:
        if kind == "magnitude":
            return ff.pruning.magnitude(model)
        if kind == "learned":
            return ff.estimate_inverse_fisher(
                model, Categorical(), batches, damping=0.1, updates=20, generator=generator(0)
            )
        size, fisher = (None, "exact") if kind == "blocks" else (1, "empirical")
        return ff.pruning.block_inverse(model, Categorical(), batches, damping=0.1, size=size, kind=fisher)

    op = inverse(low, in_dtype(halves(), dtype))
    if kind != "learned":
        assert_close(op.dense(), inverse(wide, in_dtype(halves(), torch.float32)).dense(), 1e-5)
    assert {t.dtype for t in ff.pruning.saliency(low, op).values()} == {torch.float32}
    done = ff.pruning.prune(low, op, 0.6, rounds=3, tol=1e-6)
    expected = ff.pruning.prune(wide, op, 0.6, rounds=3, tol=1e-6)
    assert done.residual <= 1e-6 and done.increase == expected.increase
    assert all(torch.equal(done.masks[name], mask) for name, mask in expected.masks.items())
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert all(torch.equal(p, wide.get_parameter(name).to(dtype)) for name, p in low.named_parameters())


def test_pruning_refuses_weights_that_would_overflow() -> None:
    """Remove one of two weights that see the same input: the other would be twice as large."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(4e4)
    x = torch.linspace(-1, 1, 9)[:, None].expand(-1, 2)
    inverse = ff.pruning.block_inverse(model, ff.likelihoods.Gaussian(), [(x, None)], damping=1e-6)
    half = copy.deepcopy(model).half()
    with pytest.raises(FloatingPointError, match=r"weights of up to 8e.04 in 'weight' .* finite in torch.float16"):
        ff.pruning.prune(half, inverse, 0.5)
    assert half.weight.tolist() == [[40000.0, 40000.0]]
    ff.pruning.prune(model, inverse, 0.5)
    assert sorted(model.weight.flatten().tolist()) == pytest.approx([0.0, 8e4], rel=1e-3)
