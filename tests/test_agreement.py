"""check_loss: what torch's losses are in terms of the likelihoods, and what it says where they differ."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson, check_loss

N, D = 4, 10


def rows(dtype: torch.dtype = torch.float32, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape or (N, D), dtype=dtype), torch.randn(*shape or (N, D), dtype=dtype)


def binary() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randint(2, (N, D)).float()


def classes() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randint(D, (N,))


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 7, 5), torch.tensor([[0, 1, 2, 3, 4, -100, -100], [1, 1, -100, 2, 0, 3, 4]])


def per_example(loss: Tensor) -> Tensor:
    return loss.flatten(1).sum(1).mean()


def flat_cross_entropy(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f.flatten(0, -2), y.flatten(), **options)


AGREE: list[tuple[Likelihood, Callable[..., Tensor], Callable[[], tuple[Tensor, Tensor]]]] = [
    (Gaussian(), lambda f, y: per_example((f - y) ** 2) / 2, rows),
    (Gaussian(math.sqrt(0.5)), lambda f, y: per_example(F.mse_loss(f, y, reduction="none")), rows),
    (Gaussian(math.sqrt(D / 2)), nn.MSELoss(), rows),
    (Gaussian(0.3), nn.GaussianNLLLoss(reduction="sum"), lambda: rows(torch.float64, 1, D)),
    (Gaussian(learn_sigma=True), lambda f, y: per_example((f - y) ** 2) / 2, rows),
    (Bernoulli(), lambda f, y: nn.BCEWithLogitsLoss()(f, y) * D, binary),
    (Bernoulli(), lambda f, y: nn.BCEWithLogitsLoss(reduction="sum")(f, y) / N, binary),
    (Categorical(), nn.CrossEntropyLoss(), classes),
    (Categorical(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1), classes),
    (Categorical(), flat_cross_entropy, tokens),
    (Poisson(), lambda f, y: nn.PoissonNLLLoss()(f, y) * D, binary),
]


@pytest.mark.parametrize(("likelihood", "loss_fn", "data"), AGREE)
def test_equal_gradients(likelihood: Likelihood, loss_fn: Any, data: Callable[[], tuple[Tensor, Tensor]]) -> None:
    if isinstance(loss_fn, nn.GaussianNLLLoss):
        gaussian = loss_fn
        loss_fn = lambda f, y: gaussian(f, y, torch.full_like(f, 0.09))  # noqa: E731
    f, y = data()
    check_loss(likelihood, loss_fn, f, y)
    with pytest.raises(ValueError, match=r"is 1\.01 times that of .*multiply the loss by 0\.990099"):
        check_loss(likelihood, lambda f, y: 1.01 * loss_fn(f, y), f, y)


MEAN = f"averages over the {D} elements of an example, and must sum over them"
HALF = "leaves out the factor 1 / (2 sigma^2)"
BOTH = f": the loss {MEAN}, and {HALF};"
TERMS = f"sums over the {N} terms of the batch, and must average over them"


def half_a_sum(f: Tensor, y: Tensor) -> Tensor:
    return flat_cross_entropy(f, y, reduction="sum") / 2


def unmasked() -> tuple[Tensor, Tensor]:
    f, y = tokens()
    return f, y.abs() % 5


DIFFER: list[tuple[Likelihood, Any, Any, str, str, str]] = [
    (Gaussian(), nn.MSELoss(), rows, "1/5 of", BOTH, "by 5, or use Gaussian(sigma=2.23607)"),
    (Gaussian(), nn.MSELoss(reduction="sum"), rows, "8 times", f": the loss {TERMS}, and {HALF};", "by 0.125, or use"),
    (Gaussian(2.0), nn.MSELoss(), rows, "0.8 times", BOTH, "by 1.25, or use Gaussian(sigma=2.23607)"),
    (Gaussian(), lambda f, y: per_example((f - y) ** 2), rows, "2 times", f": the loss {HALF};", "by 0.5, or use"),
    (Bernoulli(), nn.BCEWithLogitsLoss(), binary, f"1/{D} of", f": the loss {MEAN};", f"by {D}"),
    (Categorical(), nn.CrossEntropyLoss(reduction="sum"), classes, "4 times", f": the loss {TERMS};", "by 0.25"),
    (Categorical(), half_a_sum, unmasked, "7 times", ": the loss averages over the 2 examples only", "by 0.142857"),
    (Poisson(), lambda f, y: -nn.PoissonNLLLoss()(f, y), binary, "-0.1 times", "and must be equal;", "by -10"),
    (Gaussian(learn_sigma=True), nn.MSELoss(), rows, "1/5 of", BOTH, "by 5"),
]


@pytest.mark.parametrize(("likelihood", "loss_fn", "data", "factor", "cause", "remedy"), DIFFER)
def test_a_constant_factor_is_named(
    likelihood: Likelihood, loss_fn: Any, data: Any, factor: str, cause: str, remedy: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_loss(likelihood, loss_fn, *data())
    message = str(error.value)
    assert message.startswith(f"the gradient of the loss is {factor} that of {likelihood!r}, and must be equal")
    assert cause in message and f"multiply the loss {remedy}" in message
    assert ("or use" in message) == ("or use" in remedy)


def test_the_remedy_helps() -> None:
    f, y = rows()
    check_loss(Gaussian(2.23607), nn.MSELoss(), f, y)
    check_loss(Gaussian(), lambda f, y: 5 * nn.MSELoss()(f, y), f, y)


@pytest.mark.parametrize(
    ("likelihood", "loss_fn", "data"),
    [
        (Gaussian(), nn.L1Loss(), rows),
        (Bernoulli(), nn.MSELoss(), binary),
        (Gaussian(), nn.BCEWithLogitsLoss(), binary),
        (Gaussian(torch.arange(1.0, D + 1)), nn.MSELoss(), rows),
        (Categorical(), nn.CrossEntropyLoss(label_smoothing=0.1), classes),
        (Categorical(ignore_index=4), flat_cross_entropy, unmasked),
    ],
)
def test_another_likelihood(likelihood: Likelihood, loss_fn: Any, data: Any) -> None:
    with pytest.raises(
        ValueError, match=r"is not that of .*, nor a multiple of it \(cosine -?[01].\d+\), .* Gaussian for"
    ):
        check_loss(likelihood, loss_fn, *data())


def test_what_tells_nothing() -> None:
    f, y = rows()
    with pytest.raises(ValueError, match=r"norms 0 \(of Gaussian\(sigma=1.0\)\) and 0 \(of the loss\), and must"):
        check_loss(Gaussian(), nn.MSELoss(), f, f)
    with pytest.raises(ValueError, match=r"and 0 \(of the loss\)"):
        check_loss(Gaussian(), lambda f, y: nn.MSELoss()(y, y), f, y)
    with pytest.raises(ValueError, match="norms nan"):
        check_loss(Gaussian(), nn.MSELoss(), f * math.nan, y)
    with pytest.raises(TypeError, match=r"the loss is a Tensor of shape \(4, 10\), and must be a 0-d tensor; use"):
        check_loss(Gaussian(), nn.MSELoss(reduction="none"), f, y)
    with pytest.raises(TypeError, match="the loss is a float, and must be"):
        check_loss(Gaussian(), lambda f, y: 1.0, f, y)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="targets of shape"):
        check_loss(Gaussian(), nn.MSELoss(), f, y[:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_outputs_in_a_graph(dtype: torch.dtype) -> None:
    f, y = rows(dtype)
    f.requires_grad_()
    with torch.no_grad():
        check_loss(Gaussian(), lambda f, y: per_example((f - y) ** 2) / 2, 1 * f, y)
    assert f.grad is None
    with pytest.raises(ValueError, match="multiply the loss by"):
        check_loss(Gaussian(), nn.MSELoss(), f, y)
