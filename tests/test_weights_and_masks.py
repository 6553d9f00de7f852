"""Class weights, label smoothing and masked elements: torch's losses, Hessians, and batches without the masked part."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_likelihoods import close, randn, within_five_standard_errors
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func._noise import Noise
from fishleg_func.fisher import make_output_fisher
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

NOISE = Noise(0, torch.device("cpu"))
WEIGHT = torch.tensor([1.0, 0.0, 3.0, 0.5], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, -100, 2, 0, 3])
COMBINATIONS = list(itertools.product((None, WEIGHT), (0.0, 0.1, 0.9), (-100, 3)))


def output_fisher(kind: str, likelihood: Likelihood, f: Tensor, y: Tensor, noise: Noise) -> Callable[[Tensor], Tensor]:
    return make_output_fisher(kind, likelihood, f, likelihood.weight(f, y), y, noise)


# --- class weights and label smoothing ---


@pytest.mark.parametrize(("weight", "smoothing", "ignore"), COMBINATIONS)
@pytest.mark.parametrize("lead", [(8,), (2, 4)], ids=str)
def test_categorical_is_cross_entropy(
    weight: Tensor | None, smoothing: float, ignore: int, lead: tuple[int, ...]
) -> None:
    likelihood = Categorical(ignore, weight, smoothing)
    f, y = randn(*lead, 4), torch.where(LABELS == -100, ignore, LABELS).view(lead)
    likelihood.check_shapes(f, y)
    likelihood.check_values(f, y)
    expected = F.cross_entropy(f.view(8, 4), y.view(8), weight, ignore_index=ignore, label_smoothing=smoothing)
    close(likelihood.nll(f, y), expected)

    # F is the Hessian in the outputs: each term's is diag(p) - ppᵀ times its weight
    hessian = torch.func.hessian(likelihood.nll)(f, y).reshape(32, 32)
    exact = output_fisher("exact", likelihood, f, y, NOISE)
    t = randn(*lead, 4, seed=1)
    close(exact(t).flatten(), hessian @ t.flatten())
    kept = y != ignore
    weights = likelihood.weight(f, y)
    assert weights.shape == (*lead, 1) and torch.equal(weights[~kept], torch.zeros_like(weights[~kept]))
    if not smoothing:
        observed = torch.ones(8).double() if weight is None else weight[LABELS.clamp(min=0)]
        observed = torch.where(kept.view(8), observed, 0)
        close(weights.view(8), observed / observed.sum())
        close(weights.sum(), torch.tensor(1.0).double())
    assert likelihood.weight(f).shape == () and math.isclose(likelihood.weight(f), 1 / 8)


@pytest.mark.parametrize(("weight", "smoothing", "ignore"), COMBINATIONS)
def test_the_sampled_fisher_has_the_mean_of_the_exact_one(weight: Tensor | None, smoothing: float, ignore: int) -> None:
    likelihood, f, t = Categorical(ignore, weight, smoothing), randn(8, 4), randn(8, 4, seed=1)
    y, noise, draws = torch.where(LABELS == -100, ignore, LABELS), Noise(1, torch.device("cpu")), []
    for _ in range(2000):
        draws.append(output_fisher("sampled", likelihood, f, y, noise)(t))
        noise.advance_()
    assert within_five_standard_errors(torch.stack(draws), output_fisher("exact", likelihood, f, y, noise)(t))


def test_the_empirical_fisher_is_of_the_weighted_scores() -> None:
    likelihood, f, t = Categorical(weight=WEIGHT), randn(8, 4), randn(8, 4, seed=1)
    score = f.softmax(-1) - F.one_hot(LABELS.clamp(min=0), 4)
    weight = likelihood.weight(f, LABELS)
    expected = weight * score * (score * t).sum(-1, keepdim=True)
    close(output_fisher("empirical", likelihood, f, LABELS, NOISE)(t), expected)


def test_a_step_with_weights_is_that_of_a_batch_with_copies() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 1, 0, 2])
    copies = torch.repeat_interleave(torch.arange(6), weight[y].long())
    model = nn.Linear(5, 3)
    options: dict[str, Any] = {"q": "kronecker", "update_aux_every": 0}
    weighted = ff.fishlegify(model, Categorical(weight=weight), **options)
    gradient = weighted.natural_gradient(x, y)
    weighted.remove()
    plain = ff.fishlegify(model, Categorical(), **options)
    torch.testing.assert_close(gradient, plain.natural_gradient(x[copies], y[copies]))
    v = {"weight": torch.randn(3, 5)}
    for kind in ("exact", "empirical"):
        ours = ff.fisher_vector_product(model, Categorical(weight=weight), x, v, kind=kind, targets=y)
        theirs = ff.fisher_vector_product(model, Categorical(), x[copies], v, kind=kind, targets=y[copies])
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"weight": WEIGHT}, {"label_smoothing": 0.1}], ids=str)
def test_antithetic_products_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must have neither class weights nor label smoothing.*use fisher='exact'"):
        ff.fisher_vector_product(
            nn.Linear(2, 4), Categorical(**options), torch.ones(3, 2), {"weight": torch.ones(4, 2)}, kind="antithetic"
        )


@pytest.mark.parametrize(
    "weight",
    [-WEIGHT, WEIGHT * math.nan, WEIGHT * math.inf, 0 * WEIGHT, WEIGHT.view(2, 2), WEIGHT[0], WEIGHT[:0]],
    ids=str,
)
def test_weights_must_be_weights(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must have shape \[classes\], entries >= 0 and finite, and one > 0"):
        Categorical(weight=weight)


def test_other_arguments_of_categorical() -> None:
    for wrong in ([1.0, 2.0], torch.tensor([1, 2])):
        with pytest.raises(TypeError, match=r"weight=.* must be a floating tensor with one entry per class"):
            Categorical(weight=wrong)  # type: ignore[arg-type]
    for smoothing in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing=.* must be >= 0 and < 1"):
            Categorical(label_smoothing=smoothing)
    with pytest.raises(ValueError, match="weight has 4 entries, and must have one for each of the 3 classes"):
        Categorical(weight=WEIGHT).check_shapes(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert repr(Categorical(label_smoothing=0.1)) == "Categorical(ignore_index=-100, label_smoothing=0.1)"
    assert "weight=tensor" in repr(Categorical(weight=WEIGHT))


# --- masked elements ---

MASKED = {
    "gaussian": (Gaussian(0.5, ignore_value=math.nan), Gaussian(0.5)),
    "gaussian-number": (Gaussian(0.5, ignore_value=-9.0), Gaussian(0.5)),
    "bernoulli": (Bernoulli(ignore_value=-1), Bernoulli()),
    "poisson": (Poisson(ignore_value=-1), Poisson()),
}
every_mask = pytest.mark.parametrize(("masked", "plain"), MASKED.values(), ids=MASKED)
KEPT = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)


def batch(masked: Any, plain: Likelihood) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, targets, and targets with holes."""
    f = randn(5, 3)
    y = plain.sample(f, torch.Generator().manual_seed(0))
    return f, y, torch.where(KEPT, y, masked.ignore_value)


@every_mask
def test_masked_elements_are_not_summed_and_empty_examples_are_no_terms(masked: Any, plain: Likelihood) -> None:
    f, y, holes = batch(masked, plain)
    masked.check_shapes(f, holes)
    masked.check_values(f, holes)
    single = [plain.nll(f[i, j].view(1), y[i, j].view(1)) for i, j in KEPT.nonzero().tolist()]
    close(masked.nll(f, holes), torch.stack(single).sum() / 3)  # of five examples, two are masked altogether
    close(masked.nll(f, y), plain.nll(f, y))
    close(masked.weight(f, holes), KEPT.double() / 3)
    close(masked.weight(f), plain.weight(f))
    sampled = masked.masked(y + 1, holes)
    close(sampled[KEPT], y[KEPT] + 1)
    assert torch.equal(masked.kept(sampled), KEPT) and masked.masked(y, None) is y and plain.masked(y, holes) is y


@every_mask
def test_the_gradient_is_zero_where_masked_whatever_the_output(masked: Any, plain: Likelihood) -> None:
    f, _, holes = batch(masked, plain)
    moved = torch.where(KEPT, f, math.inf).requires_grad_()
    (gradient,) = torch.autograd.grad(masked.nll(moved, holes), moved)
    assert torch.equal(gradient[~KEPT], torch.zeros((~KEPT).sum()).double()) and gradient.isfinite().all()
    (expected,) = torch.autograd.grad(masked.nll(f.requires_grad_(), holes), f)
    close(gradient, expected)


@every_mask
def test_the_fisher_is_masked_on_both_sides(masked: Any, plain: Likelihood) -> None:
    f, _, holes = batch(masked, plain)
    t = randn(5, 3, seed=1)
    exact = output_fisher("exact", masked, f, holes, NOISE)
    close(exact(t), torch.where(KEPT, plain.fisher(f, t), 0) / 3)
    for kind in ("sampled", "empirical"):
        product = output_fisher(kind, masked, f, holes, NOISE)
        matrix = torch.stack([product(e.view(5, 3)).flatten() for e in torch.eye(15).double()])
        close(matrix, matrix.mT)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12
        assert not matrix[~KEPT.flatten()].any() and matrix.any()
    noise, draws = Noise(1, torch.device("cpu")), []
    for _ in range(2000):
        draws.append(output_fisher("sampled", masked, f, holes, noise)(t))
        noise.advance_()
    assert within_five_standard_errors(torch.stack(draws), exact(t))


@every_mask
def test_training_does_not_see_what_is_masked(masked: Any, plain: Likelihood) -> None:
    f, y, holes = batch(masked, plain)
    moved = {}
    for rows in ([0, 1, 3], [0, 1, 2, 3, 4]):  # without and with the empty examples
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        step = ff.fishlegify(model, masked, q="kronecker", u="gaussian")
        losses = [step(f[rows], holes[rows]) for _ in range(3)]
        assert all(loss.isfinite() for loss in losses)
        moved[len(rows)] = {k: p.detach() for k, p in model.named_parameters()}
    torch.testing.assert_close(moved[3], moved[5], rtol=1e-8, atol=1e-10)
    with pytest.raises(FloatingPointError, match="all masked"):
        step(f, torch.full_like(y, masked.ignore_value))


def test_antithetic_samples_take_the_mask_over() -> None:
    f, _, holes = batch(*MASKED["gaussian"])
    model, v = nn.Linear(3, 3).double(), {"weight": randn(3, 3, seed=2)}
    exact, antithetic = (
        ff.fisher_vector_product(model, MASKED["gaussian"][0], f, v, kind=kind, targets=holes)["weight"]
        for kind in ("exact", "antithetic")
    )
    torch.testing.assert_close(antithetic, exact, rtol=1e-5, atol=1e-6)  # the Hessian does not depend on the draw


def test_ignore_value_is_no_observation() -> None:
    for likelihood, wrong in ((Bernoulli, 0), (Bernoulli, 0.5), (Bernoulli, 1), (Poisson, 0), (Poisson, 3)):
        with pytest.raises(ValueError, match=rf"ignore_value={wrong} must be outside of \[0, (1|inf)\].*; use -1"):
            likelihood(ignore_value=wrong)
    with pytest.raises(TypeError, match="ignore_value='nan' must be a number, or None"):
        Gaussian(ignore_value="nan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Bernoulli targets in \[-2, 1\] must be in \[0, 1\]"):
        Bernoulli(ignore_value=-1).check_values(torch.zeros(3), torch.tensor([1.0, -1.0, -2.0]))
    assert repr(Bernoulli(ignore_value=-1)) == "Bernoulli(ignore_value=-1)"
    assert repr(Gaussian(2.0, ignore_value=math.nan)) == "Gaussian(sigma=2.0, ignore_value=nan)"
