"""The table of reductions in docs/maths.md: torch's losses times its last column are the likelihoods'."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Poisson, check_loss

N, T, D, SIGMA = 4, 3, 5, 0.7
F, REAL, BINARY = torch.randn(N, D), torch.randn(N, D), torch.randint(2, (N, D)).float()
LABELS, TOKENS = torch.arange(N) % D, torch.tensor([[0, 1, -100], [2, -100, -100], [3, 4, 0], [1, 1, 2]])
M = int((TOKENS >= 0).sum())
WEIGHT = torch.arange(1.0, D + 1)
SEQUENCE = torch.randn(N, T, D)


def tokens(loss: nn.Module) -> Callable[..., torch.Tensor]:
    return lambda f, y: loss(f.flatten(0, 1), y.flatten())


ROWS = {
    "MSELoss()": (nn.MSELoss(), D / (2 * SIGMA**2), Gaussian(SIGMA), F, REAL),
    "MSELoss(), other": (nn.MSELoss(), 1, Gaussian((D / 2) ** 0.5), F, REAL),
    'MSELoss(reduction="sum")': (nn.MSELoss(reduction="sum"), 1 / (2 * SIGMA**2 * N), Gaussian(SIGMA), F, REAL),
    "GaussianNLLLoss()": (
        lambda f, y: nn.GaussianNLLLoss()(f, y, torch.full_like(f, SIGMA**2)), D, Gaussian(SIGMA), F, REAL,
    ),
    "BCEWithLogitsLoss()": (nn.BCEWithLogitsLoss(), D, Bernoulli(), F, BINARY),
    'BCEWithLogitsLoss(reduction="sum")': (nn.BCEWithLogitsLoss(reduction="sum"), 1 / N, Bernoulli(), F, BINARY),
    "PoissonNLLLoss()": (nn.PoissonNLLLoss(), D, Poisson(), F, BINARY),
    "CrossEntropyLoss()": (nn.CrossEntropyLoss(), 1, Categorical(), F, LABELS),
    "CrossEntropyLoss(), tokens": (tokens(nn.CrossEntropyLoss()), 1, Categorical(), SEQUENCE, TOKENS),
    "CrossEntropyLoss(weight=w)": (nn.CrossEntropyLoss(WEIGHT), 1, Categorical(weight=WEIGHT), F, LABELS),
    'CrossEntropyLoss(reduction="sum")': (
        tokens(nn.CrossEntropyLoss(reduction="sum")), 1 / M, Categorical(), SEQUENCE, TOKENS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_true(name: str) -> None:
    loss, factor, likelihood, outputs, targets = ROWS[name]
    check_loss(likelihood, lambda f, y: factor * loss(f, y), outputs, targets)


def test_every_row_is_tested() -> None:
    page = (Path(__file__).parents[1] / "docs" / "maths.md").read_text(encoding="utf-8")
    table = page.split("### Reductions")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+Loss\(.*?\))`", table, flags=re.MULTILINE)) == {k.split(", ")[0] for k in ROWS}
