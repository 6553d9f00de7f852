"""Fisher-vector products against the dense oracle: exactly, or in expectation; and free of side effects."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import pytest
import torch
from cases import (
    CASES,
    LIKELIHOODS,
    SIGMA,
    Case,
    assert_close,
    assert_same,
    filled,
    flat,
    generator,
    randn,
    snapshot,
    targets_for,
    unflat,
)
from torch import Tensor, nn

from fishleg_func import fisher_vector_product, likelihoods, reference
from fishleg_func.fisher import KINDS

MAIN = ("mlp", "cnn", "twice", "sequence")


def problem(case: str, likelihood: str, batch: int = 5) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return model, inputs, targets and the oracle's Fisher."""
    model, x = CASES[case].model(), CASES[case].inputs(batch)
    y = targets_for(model, x, likelihood)
    return model, x, y, reference.fisher(model, x, likelihood, sigma=SIGMA, targets=y)


def product(model: nn.Module, likelihood: str, x: Tensor, vector: Tensor, **options: object) -> Tensor:
    """Return the library's product on flat vectors."""
    out = fisher_vector_product(model, LIKELIHOODS[likelihood], x, unflat(model, vector), **options)  # type: ignore[arg-type]
    return flat(model, out)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", MAIN)
def test_exact_is_the_oracle(case: str, likelihood: str) -> None:
    model, x, y, F = problem(case, likelihood)
    v = randn(len(F), seed=50)
    assert_close(product(model, likelihood, x, v, targets=y), F @ v, 1e-10, case)
    assert_close(product(model, likelihood, x, v, targets=y, damping=0.3), F @ v + 0.3 * v, 1e-10, "damped")


@pytest.mark.parametrize("case", ["embedding", "attention"])
@pytest.mark.parametrize("training", [True, False])
def test_exact_is_the_oracle_for_embeddings_and_attention(case: str, training: bool) -> None:
    model, x = CASES[case].model().train(training), CASES[case].inputs()
    F = reference.fisher(model, x, "gaussian", sigma=SIGMA)
    v = randn(len(F), seed=50)
    assert_close(product(model, "gaussian", x, v), F @ v, 1e-10, case)


def test_the_mask_counts() -> None:
    model, x, y, F = problem("sequence", "categorical")
    v = randn(len(F), seed=50)
    unmasked = product(model, "categorical", x, v)
    assert_close(unmasked, reference.fisher(model, x, "categorical") @ v, 1e-10)
    assert (unmasked - F @ v).norm() > 1e-3 * (F @ v).norm()
    assert (y == -100).any() and (y != -100).any()


def test_a_subset_of_parameters_holds_the_rest_constant() -> None:
    model, x, _, F = problem("cnn", "gaussian")
    v = unflat(model, randn(len(F), seed=50))
    some = {k: v[k] for k in ("1.bias", "3.weight")}
    whole = flat(model, {k: v[k] if k in some else torch.zeros_like(v[k]) for k in v})
    out = fisher_vector_product(model, LIKELIHOODS["gaussian"], x, some, damping=0.1)
    expected = unflat(model, F @ whole + 0.1 * whole)
    assert out.keys() == some.keys()
    for k in some:
        assert_close(out[k], expected[k], 1e-10, k)


def test_inputs_may_be_a_tuple_or_a_dict_and_output_picks_the_parameters_out() -> None:
    model, x = filled(nn.Bilinear(2, 2, 1)), randn(2, 3, 2)
    v = unflat(model, randn(5, seed=1))
    positional = fisher_vector_product(model, LIKELIHOODS["poisson"], (x[0], x[1]), v)
    keyed = fisher_vector_product(model, LIKELIHOODS["poisson"], {"input2": x[1], "input1": x[0]}, v)
    assert_same(positional, keyed)
    assert_close(flat(model, keyed), reference.fisher(model, (x[0], x[1]), "poisson") @ flat(model, v), 1e-10)
    squeezed = fisher_vector_product(model, LIKELIHOODS["poisson"], (x[0], x[1]), v, output=lambda f: f[:, 0])
    assert_same(positional, squeezed)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", MAIN)
def test_empirical_is_the_score_fisher(case: str, likelihood: str) -> None:
    model, x, y, F = problem(case, likelihood)
    S, v = reference.score_fisher(model, x, y, likelihood, sigma=SIGMA), randn(len(F), seed=50)
    assert_close(product(model, likelihood, x, v, kind="empirical", targets=y, damping=0.2), S @ v + 0.2 * v, 1e-10)
    assert (S @ v - F @ v).norm() > 1e-3 * (F @ v).norm()  # the two kinds are not the same thing


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize(("case", "likelihood"), list(zip(MAIN, LIKELIHOODS, strict=True)))
def test_products_are_positive_semi_definite(kind: str, case: str, likelihood: str) -> None:
    model, x, y, F = problem(case, likelihood, batch=3)
    for seed in range(200):
        v = randn(len(F), seed=seed)
        out = product(model, likelihood, x, v, kind=kind, targets=y, generator=generator(seed))
        assert v @ out >= -1e-12 * v.norm() * out.norm(), seed


def averaged(draw: Callable[[], Tensor], size: Tensor, least: int = 60, most: int = 6000) -> tuple[Tensor, Tensor]:
    """Average draws until the standard error is four percent of ``size``; return mean and standard errors."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    while count < most:
        x = draw()
        total, squares, count = total + x, squares + x**2, count + 1
        mean = total / count
        error = ((squares / count - mean**2).clamp(min=0) / max(count - 1, 1)).sqrt()
        if count >= least and error.norm() <= 0.04 * size.norm():
            return mean, error
    raise AssertionError(f"the standard error is {error.norm() / size.norm():.3f} of the size after {most} draws")


SMALL = Case(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (2,))


@pytest.mark.parametrize("batch", [3, 24])
@pytest.mark.parametrize("kind", ["sampled", "antithetic"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sampled_kinds_are_unbiased_at_two_batch_sizes(likelihood: str, kind: str, batch: int) -> None:
    """Hold every entry within five standard errors, and the whole far from F/B (the outer product of a mean)."""
    model, x = SMALL.model(), SMALL.inputs(batch)
    y, source = targets_for(model, x, likelihood), generator(batch)
    F = reference.fisher(model, x, likelihood, sigma=SIGMA, targets=y)
    v = F @ randn(len(F), seed=50)  # a direction that the Fisher does not annihilate
    exact = F @ v
    draw = lambda: product(model, likelihood, x, v, kind=kind, targets=y, generator=source)  # noqa: E731
    mean, error = averaged(draw, exact)
    assert ((mean - exact).abs() <= 5 * error + 1e-7 * exact.norm()).all()
    ratio = (mean @ exact / (exact @ exact)).item()
    assert 0.8 < ratio < 1.2, f"the average is {ratio:.3f} F; 1/B = {1 / batch:.3f}"


@pytest.mark.parametrize("kind", ["sampled", "antithetic"])
def test_sampled_kinds_follow_their_generator(kind: str) -> None:
    model, x, _, F = problem("mlp", "categorical")
    v = randn(len(F), seed=50)
    one, same, other = (product(model, "categorical", x, v, kind=kind, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


class Scaled(likelihoods.Gaussian):
    """A Gaussian whose loss is multiplied by a factor, its samples being the same."""

    def __init__(self, factor: float) -> None:
        super().__init__(SIGMA)
        self.factor = factor

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.factor * super().nll(outputs, targets)


@pytest.mark.parametrize("factor", [1e-6, 1e-2, 1e4, 1e9])
def test_antithetic_is_linear_in_the_scale_of_v_and_of_the_loss(factor: float) -> None:
    model, x, _, F = problem("mlp", "gaussian")
    v = unflat(model, randn(len(F), seed=50))

    def at(loss: float, size: float) -> Tensor:
        direction = {k: size * t for k, t in v.items()}
        return flat(
            model, fisher_vector_product(model, Scaled(loss), x, direction, kind="antithetic", generator=generator(0))
        )

    assert_close(at(1.0, factor), factor * at(1.0, 1.0), 1e-7, "v")
    assert_close(at(factor, 1.0), factor * at(1.0, 1.0), 1e-7, "loss")


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gives_zero(kind: str) -> None:
    model, x, y, F = problem("cnn", "gaussian")
    assert torch.equal(
        product(model, "gaussian", x, torch.zeros(len(F)).double(), kind=kind, targets=y), torch.zeros_like(F[0])
    )


class Trap(nn.Module):
    """Raise at call number ``at`` (counted from one)."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.calls = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ArithmeticError("in the model's forward")
        return x


def delicate() -> tuple[nn.Module, Trap, Tensor, Tensor]:
    """Return a model with batch norm, dropout, a frozen parameter, gradients, hooks, and one part in eval mode."""
    trap = Trap()
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), trap, nn.Linear(4, 2)
    )
    model = filled(model)
    model[4].eval()
    model[0].register_forward_hook(lambda *_: None)
    x, y = randn(6, 3), randn(6, 2, seed=1)
    model(x).square().sum().backward()
    model[3].bias.requires_grad_(False)
    trap.calls = 0
    return model, trap, x, y


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed(kind: str) -> None:
    model, trap, x, y = delicate()
    before, v = snapshot(model), {k: torch.ones_like(p) for k, p in model.named_parameters() if p.requires_grad}
    kept = {k: t.clone() for k, t in v.items()}
    out = fisher_vector_product(model, LIKELIHOODS["gaussian"], x, v, kind=kind, targets=y)
    assert_same(before, snapshot(model))
    assert_same(kept, v)
    assert trap.calls >= 1 and not any(t.requires_grad for t in out.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed_by_an_exception_in_the_forward(kind: str) -> None:
    model, trap, x, y = delicate()
    before, v = snapshot(model), {k: torch.ones_like(p) for k, p in model.named_parameters() if p.requires_grad}
    for at in range(1, 4 if kind == "antithetic" else 2):
        trap.calls, trap.at = 0, at
        with pytest.raises(ArithmeticError):
            fisher_vector_product(model, LIKELIHOODS["gaussian"], x, v, kind=kind, targets=y)
        assert_same(before, snapshot(model), f"at call {at}")


class FixedDropout(nn.Module):
    """Multiply by a mask that was drawn before."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_one_product_sees_one_dropout_mask() -> None:
    """Compare with the oracle on a model whose mask is the one that the global stream gives."""
    layers = (nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))
    model, x = filled(nn.Sequential(*layers)).train(), randn(5, 3)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    mask = nn.functional.dropout(torch.ones(5, 8, dtype=torch.float64), 0.5)
    torch.set_rng_state(state)
    frozen = nn.Sequential(layers[0], layers[1], FixedDropout(mask), layers[3])
    F = reference.fisher(frozen, x, "gaussian", sigma=SIGMA)
    u, v = randn(len(F), seed=50), randn(len(F), seed=51)
    Fu, Fv = product(model, "gaussian", x, u), product(model, "gaussian", x, v)
    assert 0 < (mask == 0).sum() < mask.numel()
    assert_close(Fv, F @ v, 1e-10, "the frozen mask")
    assert_close(u @ Fv, v @ Fu, 1e-10, "symmetry")
    out = product(model, "gaussian", x, v, kind="antithetic")
    assert out.norm() < 100 * (F @ v).norm()  # another mask on the other side would give a difference over epsilon
    torch.manual_seed(4)
    assert (product(model, "gaussian", x, v) - Fv).norm() > 1e-3 * Fv.norm()  # the next mask is another


class Tied(nn.Module):
    """An embedding whose table is also the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


def shared_layer() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.BatchNorm1d(3))


def shared_block() -> nn.Module:
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
    return nn.Sequential(block, block)


@pytest.mark.parametrize(("build", "vocabulary"), [(shared_layer, 0), (shared_block, 0), (Tied, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_or_weight_under_two_names(build: Callable[[], nn.Module], vocabulary: int, kind: str) -> None:
    model = filled(build()).train()
    x = Case(build, (3,), vocabulary).inputs()
    y = targets_for(model, x, "gaussian")
    before, F = snapshot(model), reference.fisher(model, x, "gaussian", sigma=SIGMA)
    v = randn(len(F), seed=50)
    out = product(model, "gaussian", x, v, kind=kind, targets=y)
    assert_same(before, snapshot(model))
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m.parameters())
    if kind == "exact":
        assert_close(out, F @ v, 1e-10)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = LIKELIHOODS["gaussian"].nll(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] and math.isfinite(losses[2])


ERRORS = (
    ({"kind": "fisher"}, r"kind='fisher' must be one of 'exact', 'sampled', 'empirical', 'antithetic'"),
    ({"damping": -1.0}, r"damping=-1.0 must be >= 0 and finite; use 0"),
    ({"damping": math.nan}, r"damping=nan must be >= 0 and finite; use 0"),
    ({"kind": "empirical"}, r"targets=None must be given for kind='empirical'; pass the observed targets"),
    ({"v": {}}, r"0 entries; it must be a non-empty dict .*'0.bias', '0.weight'"),
    (
        {"v": {"0.weigth": torch.ones(1), "0.bias": torch.ones(5)}},
        r"unknown names \['0.weigth'\], wrong shapes \['0.bias: \(5,\) instead of \(4,\)'\].*must be.*'0.weight'",
    ),
    ({"targets": torch.zeros(5, 7)}, r"targets of shape \(5, 7\) must have the shape \(5, 3\).*reshape"),
)


@pytest.mark.parametrize(("change", "match"), ERRORS)
def test_errors_state_value_requirement_and_remedy(change: dict[str, object], match: str) -> None:
    model, x, _, F = problem("mlp", "gaussian")
    arguments = {"v": unflat(model, randn(len(F)))} | change
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        fisher_vector_product(model, LIKELIHOODS["gaussian"], x, **arguments)  # type: ignore[arg-type]
    assert_same(before, snapshot(model))


def test_the_checks_notice_a_product_that_returns_its_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "fisher_vector_product", lambda model, likelihood, x, v, **_: v)
    for case, likelihood in itertools.product(MAIN, LIKELIHOODS):
        for check in (test_exact_is_the_oracle, test_empirical_is_the_score_fisher):
            with pytest.raises(AssertionError):
                check(case, likelihood)
    for likelihood, kind in itertools.product(LIKELIHOODS, ("sampled", "antithetic")):
        with pytest.raises(AssertionError):
            test_sampled_kinds_are_unbiased_at_two_batch_sizes(likelihood, kind, 3)
