"""Likelihoods against the oracle, and their Fisher against the scores and samples that it is the covariance of."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fishleg_func import _noise, reference
from fishleg_func._noise import Noise
from fishleg_func._resolve import as_likelihood, resolve
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

SIGMAS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def within_five_standard_errors(draws: Tensor, expected: Tensor) -> bool:
    """Whether the mean over the first dimension is ``expected``: a wrong mean fails the more surely the more draws."""
    error = draws.std(0) / math.sqrt(len(draws))
    return bool(((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all())


@pytest.fixture(autouse=True)
def own_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_noise, "_generators", {})  # draws do not depend on what ran before


@dataclasses.dataclass(frozen=True)
class Case:
    """A likelihood, its name in the oracle, and shapes of its outputs."""

    likelihood: Likelihood
    name: str
    sigma: Any = 1.0


CASES = {
    "gaussian": Case(Gaussian(), "gaussian"),
    "gaussian-sigma": Case(Gaussian(0.3), "gaussian", 0.3),
    "bernoulli": Case(Bernoulli(), "bernoulli"),
    "poisson": Case(Poisson(), "poisson"),
    "categorical": Case(Categorical(), "categorical"),
}
SHAPES = [(4,), (1, 1), (4, 3), (2, 3, 4), (2, 3, 2, 2)]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_case_and_shape = pytest.mark.parametrize(
    ("case", "shape"),
    # class labels need a dimension of classes
    [(case, shape) for case in CASES.values() for shape in SHAPES if case.name != "categorical" or len(shape) > 1],
    ids=lambda x: str(x) if isinstance(x, tuple) else repr(x.likelihood),
)


def drawn(case: Case, outputs: Tensor) -> Tensor:
    return case.likelihood.sample(outputs, torch.Generator().manual_seed(1))


def hessians(case: Case, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Terms as rows, ``[T, D]``, and H of each, ``[T, D, D]``, from closed forms."""
    f = outputs.reshape(-1, outputs.shape[-1]) if case.name == "categorical" else outputs.reshape(len(outputs), -1)
    p = f.softmax(-1)
    h = {
        "gaussian": torch.full_like(f, case.sigma**-2),
        "bernoulli": f.sigmoid() * (1 - f.sigmoid()),
        "poisson": f.exp(),
    }
    H = (
        torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        if case.name == "categorical"
        else torch.diag_embed(h[case.name])
    )
    return f, H


# --- value ---


@every_case_and_shape
def test_nll_is_that_of_the_oracle(case: Case, shape: tuple[int, ...]) -> None:
    f = randn(*shape)
    y = drawn(case, f)
    actual = case.likelihood.nll(f, y)
    assert actual.shape == ()
    close(actual, reference.negative_log_likelihood(f, y, case.name, sigma=case.sigma))
    case.likelihood.check_shapes(f, y)
    case.likelihood.check_values(f, y)


@pytest.mark.parametrize("ignore", [-100, 2])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 2, 2)], ids=str)
def test_ignored_positions_are_not_terms(lead: tuple[int, ...], ignore: int) -> None:
    likelihood, f, y = Categorical(ignore_index=ignore), randn(*lead, 4), torch.zeros(lead, dtype=torch.long)
    y.view(-1)[1:3] = ignore
    expected = reference.negative_log_likelihood(f, y, "categorical", ignore_index=ignore)
    close(likelihood.nll(f, y), expected)
    assert not torch.isclose(expected, Categorical(ignore_index=99).nll(f, y.where(y != ignore, 0)))
    moved = f + 10 * randn(*lead, 4, seed=1) * (y == ignore).unsqueeze(-1)
    close(likelihood.nll(moved, y), expected)
    weight = likelihood.weight(f, y)
    assert weight.shape == (*lead, 1)
    close(weight.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(weight.squeeze(-1) == 0, y == ignore)
    assert torch.equal(likelihood.masked(torch.ones_like(y), y), torch.where(y == ignore, ignore, 1))
    assert torch.equal(likelihood.masked(torch.ones_like(y), None), torch.ones_like(y))
    likelihood.check_shapes(f, y)
    likelihood.check_values(f, y)


def test_integer_labels_in_a_batch_of_as_many_as_classes() -> None:
    f, y = randn(3, 3), torch.tensor([2, 0, 0])
    close(Categorical().nll(f, y), (f.exp().sum(1).log() - torch.stack([f[0, 2], f[1, 0], f[2, 0]])).mean())
    f, y = randn(3, 3, 3), torch.randint(3, (3, 3))  # sequences: classes are the last dimension, each position a term
    close(Categorical().nll(f, y), Categorical().nll(f.reshape(9, 3), y.reshape(9)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.int64])
def test_labels_and_counts_may_be_any_integers(dtype: torch.dtype) -> None:
    f, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    close(Categorical().nll(f, y.to(dtype)), Categorical().nll(f, y))
    counts = torch.tensor([[0, 1, 1]]).expand(4, 3)
    for likelihood in (Bernoulli(), Poisson(), Gaussian()):
        close(likelihood.nll(f, counts.to(dtype)), likelihood.nll(f, counts.double()))
    close(Bernoulli().nll(f, counts.bool()), Bernoulli().nll(f, counts.double()))


@pytest.mark.parametrize("sigma", [SIGMAS, SIGMAS.float(), SIGMAS.expand(4, 3)], ids=["vector", "float32", "matrix"])
def test_sigma_may_be_a_tensor(sigma: Tensor) -> None:
    likelihood, f, y, t = Gaussian(sigma), randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    columns = [
        reference.negative_log_likelihood(f[:, k : k + 1], y[:, k : k + 1], "gaussian", sigma=float(SIGMAS[k]))
        for k in range(3)
    ]
    close(likelihood.nll(f, y), torch.stack(columns).sum())
    close(likelihood.fisher(f, t), t / SIGMAS**2)
    close(likelihood.score(f, Noise(0, CPU)).abs(), (1 / SIGMAS).expand(4, 3))
    samples = torch.stack([likelihood.sample(f, torch.Generator().manual_seed(k)) for k in range(2000)]) - f
    assert within_five_standard_errors(samples, torch.zeros(4, 3))
    assert within_five_standard_errors(samples**2, SIGMAS.expand(4, 3) ** 2)


# --- curvature ---


def check_fisher(case: Case, likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    outputs, t = randn(*shape), randn(*shape, seed=1)
    f, H = hessians(case, outputs)
    actual = likelihood.fisher(outputs, t)
    assert actual.shape == outputs.shape
    close(actual, (H @ t.reshape(*f.shape, 1)).reshape(shape))


def check_score(case: Case, likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    outputs = randn(*shape)
    f, H = hessians(case, outputs)
    noise, draws = Noise(3, CPU), []
    for _ in range(2000):
        draws.append(likelihood.score(outputs, noise).reshape(f.shape))
        noise.advance_()
    z = torch.stack(draws)
    assert within_five_standard_errors(z, torch.zeros_like(f))
    assert within_five_standard_errors(z[:, :, :, None] * z[:, :, None, :], H)
    if len(f) > 1:  # terms are independent
        assert within_five_standard_errors(z[:, :1] * z[:, 1:], torch.zeros_like(f[1:]))


def check_sample(case: Case, likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    outputs = randn(*shape)
    source = torch.Generator().manual_seed(0)
    draws = torch.stack([likelihood.sample(outputs, source) for _ in range(2000)])
    if case.name == "categorical":
        assert draws.dtype == torch.int64
        frequencies = torch.nn.functional.one_hot(draws, shape[-1]).double()
        assert within_five_standard_errors(frequencies, outputs.softmax(-1))
        return
    moments = {  # mean and variance
        "gaussian": (outputs, torch.full_like(outputs, case.sigma**2)),
        "bernoulli": (outputs.sigmoid(), outputs.sigmoid() * (1 - outputs.sigmoid())),
        "poisson": (outputs.exp(), outputs.exp()),
    }
    mean, variance = moments[case.name]
    assert draws.dtype == outputs.dtype
    assert within_five_standard_errors(draws, mean)
    assert within_five_standard_errors((draws - mean) ** 2, variance)


CHECKS = (check_fisher, check_score, check_sample)


@every_case_and_shape
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_curvature(case: Case, shape: tuple[int, ...], check: Callable[..., None]) -> None:
    check(case, case.likelihood, shape)


@every_case
def test_scores_are_those_of_the_noise(case: Case) -> None:
    f = randn(4, 3)
    first, again = (case.likelihood.score(f, Noise(5, CPU)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, case.likelihood.score(f, Noise(6, CPU)))


@every_case_and_shape
def test_terms(case: Case, shape: tuple[int, ...]) -> None:
    s, t = randn(*shape), randn(*shape, seed=1)
    terms = math.prod(shape[:-1]) if case.name == "categorical" else shape[0]
    inner = case.likelihood.term_inner(s, t)
    assert inner.numel() == terms and inner.ndim == s.ndim
    close(inner.reshape(-1), (s * t).reshape(terms, -1).sum(1))
    assert case.likelihood.event_dims(s) == ((s.ndim - 1,) if case.name == "categorical" else tuple(range(1, s.ndim)))
    close(case.likelihood.weight(s).expand_as(inner).sum(), torch.tensor(1.0, dtype=torch.float64))


# --- a likelihood of one's own, with nothing but nll and sample ---


class Exponential(Likelihood):
    """Waiting times with log-rate f: the Fisher of each element is one."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.exp() * targets - outputs).sum() / len(outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return -(1 - torch.rand(outputs.shape, dtype=outputs.dtype, generator=generator)).log() / outputs.exp()


class Duck:
    """The same without the base class."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return Exponential().nll(outputs, targets)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return Exponential().sample(outputs, generator)


class Signs(Exponential):
    """With a score of its own, from the noise that it is given."""

    def score(self, outputs: Tensor, noise: Noise) -> Tensor:
        return noise.rademacher(outputs)


def derived(likelihood: Likelihood, f: Tensor) -> Tensor:
    """The estimate of H for each term, ``[N, D, D]``."""
    size = f[0].numel()
    basis = torch.eye(size, dtype=f.dtype).reshape(size, 1, *f.shape[1:])
    return torch.stack([likelihood.fisher(f, e.expand_as(f)).reshape(len(f), size) for e in basis], -1)


@pytest.mark.parametrize("custom", [Exponential(), Duck(), Signs()], ids=["subclass", "duck", "score"])
@pytest.mark.parametrize("shape", [(400,), (400, 2), (400, 2, 2)], ids=str)
def test_derived_fisher_is_unbiased_and_positive_semi_definite(custom: Any, shape: tuple[int, ...]) -> None:
    likelihood, f, t = as_likelihood(custom), randn(*shape), randn(*shape, seed=1)
    global_stream = torch.get_rng_state()
    assert (likelihood.term_inner(t, likelihood.fisher(f, t)) >= 0).all()
    H = derived(likelihood, f)
    size = H.shape[-1]
    assert within_five_standard_errors(H, torch.eye(size, dtype=f.dtype))  # of each term, so symmetric in expectation
    assert torch.equal(torch.get_rng_state(), global_stream)


@pytest.mark.parametrize("custom", [Exponential(), Signs()], ids=["sample", "score"])
def test_derived_fisher_averages_independent_draws(custom: Likelihood) -> None:
    f, errors = randn(1000, 2), {}
    for custom.draws in (1, 16):
        errors[custom.draws] = derived(custom, f)[:, 0, 1].std()
    assert 3 < errors[1] / errors[16] < 5  # the root of 16


def test_an_adapted_object_has_the_defaults_and_its_own_fisher() -> None:
    adapted, f = as_likelihood(Duck()), randn(3, 2)
    y = adapted.sample(f, torch.Generator().manual_seed(0))
    close(adapted.nll(f, y), Exponential().nll(f, y))
    close(adapted.weight(f), torch.tensor(1 / 3, dtype=torch.float64))
    assert adapted.masked(y, y) is y and "Duck" in repr(adapted)
    duck = Duck()
    duck.fisher = lambda outputs, tangent: 3 * tangent  # type: ignore[attr-defined]
    assert torch.equal(as_likelihood(duck).fisher(f, f), 3 * f)
    own = Exponential()
    assert as_likelihood(own) is own


@pytest.mark.parametrize("candidate", ["gaussian", torch.nn.MSELoss(), None, Categorical, Duck])
def test_what_is_no_likelihood(candidate: Any) -> None:
    with pytest.raises(TypeError, match=r"likelihood=.* must have the methods nll.*and sample.*; use an instance"):
        as_likelihood(candidate)


# --- what targets call for, and errors that say value, requirement and remedy ---


def test_resolve() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    assert isinstance(resolve(torch.zeros(4, 3), labels), Categorical)
    assert isinstance(resolve(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int32)), Categorical)
    for shape in ((4, 3), (4,), (2, 3, 5)):
        gaussian = resolve(torch.zeros(shape), torch.zeros(shape))
        assert isinstance(gaussian, Gaussian) and gaussian.sigma == 1.0


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(4, 1), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool)),
    ],
)
def test_resolve_names_the_likelihoods_where_it_cannot(outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"dtype torch\.\w+ and shape \(.*Gaussian\(\), Bernoulli\(\), .*Categorical\(\), Poisson\(\)"
    ):
        resolve(outputs, targets)


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli(), Poisson()], ids=repr)
@pytest.mark.parametrize(("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 3), (4, 2)), ((), ())])
def test_shapes_of_elementwise_targets(
    likelihood: Likelihood, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"targets of shape \(.*\) must have the shape \(.*\).*; reshape them"):
        likelihood.check_shapes(torch.zeros(outputs), torch.zeros(targets))


def test_shapes_and_dtypes_of_labels() -> None:
    for outputs, targets in (((4, 3), (3,)), ((4,), (4,)), ((2, 3, 5), (2, 5)), ((4, 3), (4, 1))):
        with pytest.raises(
            ValueError, match=r"targets of shape \(.*\) must have shape .*; move the class dimension last"
        ):
            Categorical().check_shapes(torch.zeros(outputs), torch.zeros(targets, dtype=torch.long))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(
            TypeError, match=r"targets of dtype torch\.\w+ must be integer class labels.*; use targets.long"
        ):
            Categorical().check_shapes(torch.zeros(4, 3), torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        (Bernoulli(), torch.tensor([[-1.0, 1.0]]), r"Bernoulli targets in \[-1, 1\] must be in \[0, 1\]; scale them"),
        (Poisson(), torch.tensor([[2.0, -3.0]]), r"Poisson targets in \[-3, 2\] must be in \[0, inf\]; counts"),
        (Categorical(), torch.tensor([0, 2]), r"Categorical targets in \[0, 2\] must be in \[0, 1\]; class numbers"),
        (Categorical(5), torch.tensor([5, -100]), r"Categorical targets in \[-100, -100\] must be in \[0, 1\]; class"),
    ],
)
def test_values_out_of_range(likelihood: Likelihood, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood.check_values(torch.zeros(2, 2), targets)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0])])
def test_sigma_must_be_positive(sigma: Any) -> None:
    with pytest.raises(ValueError, match=r"sigma=.* must be > 0 and finite; use a positive number"):
        Gaussian(sigma)


def test_repr_is_the_call() -> None:
    for text in ("Gaussian(sigma=0.5)", "Bernoulli()", "Poisson()", "Categorical(ignore_index=-1)"):
        assert repr(eval(text)) == text
    assert repr(Exponential()) == "Exponential()"


# --- a check that cannot fail is none: each is given a likelihood that breaks it ---

MUTATIONS: dict[Callable[..., None], tuple[str, Callable[..., Any]]] = {
    check_fisher: ("fisher", lambda self, outputs, tangent: tangent),
    check_score: ("score", lambda self, outputs, noise: noise.rademacher(outputs)),
    check_sample: ("sample", lambda self, outputs, generator: (outputs > 0).to(outputs.dtype)),
}


@pytest.mark.parametrize("check", MUTATIONS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["gaussian-sigma", "bernoulli", "poisson"])
def test_each_check_fails_on_a_broken_likelihood(check: Callable[..., None], name: str) -> None:
    case = CASES[name]
    method, replacement = MUTATIONS[check]
    broken = type("Broken", (type(case.likelihood),), {method: replacement})()
    with pytest.raises(AssertionError):
        check(case, broken, (4, 3))
