"""The counter-based noise: its moments, independence and purity, and that the caller's random stream is left alone."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fishleg_func._noise import Noise, new_noise

CPU = torch.device("cpu")
SIZE = 100_000
Draw = Callable[[Noise, Tensor, int], Tensor]
DRAWS: dict[str, Draw] = {"rademacher": Noise.rademacher, "normal": Noise.normal}
MOMENTS = {"rademacher": (0, 1, 0, 1), "normal": (0, 1, 0, 3)}  # E[x^k], k = 1 to 4
every_draw = pytest.mark.parametrize("kind", DRAWS)


def check_moments(kind: str, x: Tensor) -> None:
    for k, expected in enumerate(MOMENTS[kind], 1):
        error = (x**k).std() / math.sqrt(len(x))
        assert ((x**k).mean() - expected).abs() <= 5 * error + 1e-12


def check_independent(x: Tensor, y: Tensor) -> None:
    for a, b in ((x, y), (x.abs() + x, y.abs() - y), (x.square(), y)):
        correlation = ((a - a.mean()) * (b - b.mean())).mean()
        assert correlation.abs() <= 5 * (a.std() * b.std()) / math.sqrt(len(a)) + 1e-12


def like(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def sources() -> list[Noise]:
    """Noise at neighboring seeds and counters, where a weak mixing function shows."""
    noises = [Noise(seed, CPU) for seed in (0, 1, 2, -1, 2**63)]
    for steps in (1, 2, 1000):
        noises.append(Noise(0, CPU))
        for _ in range(steps):
            noises[-1].advance_()
    return noises


@every_draw
def test_moments(kind: str) -> None:
    for noise in sources():
        check_moments(kind, DRAWS[kind](noise, like(SIZE), 0))
    check_moments(kind, DRAWS[kind](Noise(0, CPU), like(SIZE), 7))


def test_normal_tails() -> None:
    x = Noise(0, CPU).normal(like(SIZE)).abs()
    for bound in (0.5, 1.0, 2.0, 3.0):
        p = math.erfc(bound / math.sqrt(2))
        assert abs((x > bound).double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / SIZE)
    assert x.max() < 9


def test_rademacher_is_a_sign() -> None:
    assert set(Noise(0, CPU).rademacher(like(1000)).tolist()) == {-1.0, 1.0}


@every_draw
def test_draws_of_other_seeds_counters_and_salts_are_independent(kind: str) -> None:
    draws = [DRAWS[kind](noise, like(SIZE), 0) for noise in sources()]
    draws += [DRAWS[kind](Noise(0, CPU), like(SIZE), salt) for salt in (1, 2, 3)]
    for x, y in itertools.combinations(draws, 2):
        check_independent(x, y)
    check_independent(Noise(0, CPU).normal(like(SIZE)), Noise(0, CPU).rademacher(like(SIZE)))


@every_draw
def test_entries_of_one_draw_are_independent(kind: str) -> None:
    x = DRAWS[kind](Noise(0, CPU), like(SIZE), 0)
    for lag in (1, 2, 3, 64, 1000):
        check_independent(x[:-lag], x[lag:])


@pytest.mark.parametrize("mutation", ["shifted", "biased", "repeated"])
def test_the_checks_fail_on_bad_noise(mutation: str) -> None:
    x = Noise(0, CPU).normal(like(SIZE))
    with pytest.raises(AssertionError):
        if mutation == "repeated":
            check_independent(x, x)
        else:
            check_moments("normal", x + 0.05 if mutation == "shifted" else 1.05 * x)


@every_draw
@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(-(2**70), 2**70),
    salt=st.integers(0, 100),
)
def test_draws_are_pure(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, salt: int) -> None:
    noise, target = Noise(seed, CPU), like(*shape, dtype=dtype)
    counter, stream = noise.counter.clone(), torch.get_rng_state()
    x = DRAWS[kind](noise, target, salt)
    assert (x.shape, x.dtype, x.device) == (target.shape, dtype, CPU)
    assert x.isfinite().all()
    assert torch.equal(x, DRAWS[kind](Noise(seed, CPU), target, salt))
    assert torch.equal(noise.counter, counter) and torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(x.double().to(dtype), DRAWS[kind](noise, target.double(), salt).to(dtype))


@every_draw
def test_draws_resume_from_the_counter(kind: str) -> None:
    noise, resumed = Noise(3, CPU), Noise(4, CPU)
    first = DRAWS[kind](noise, like(50), 0)
    noise.advance_()
    resumed.counter.copy_(noise.counter)
    second = DRAWS[kind](noise, like(50), 0)
    assert torch.equal(second, DRAWS[kind](resumed, like(50), 0))
    assert not torch.equal(first, second)


@every_draw
def test_compiled_draws_are_the_eager_ones(kind: str) -> None:
    noise = Noise(2**63 + 5, CPU)

    def draw(target: Tensor) -> tuple[Tensor, Tensor]:
        return DRAWS[kind](noise, target, 0), DRAWS[kind](noise, target, 3)

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the counter is read, not built in
        for shape in ((7,), (3, 5), ()):
            assert all(map(torch.equal, draw(like(*shape)), compiled(like(*shape))))
        noise.advance_()


def test_new_noise_is_new_and_leaves_the_global_stream_alone() -> None:
    stream = torch.get_rng_state()
    first, second = (new_noise(CPU).normal(like(10)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_generator_gives_the_seed() -> None:
    first, second = (new_noise(CPU, torch.Generator().manual_seed(5)).normal(like(10)) for _ in range(2))
    assert torch.equal(first, second)


def test_forks_are_independent_and_repeatable() -> None:
    noise = Noise(1, CPU)
    one, again, other = (noise.fork(salt).normal(like(1000)) for salt in (1, 1, 2))
    assert torch.equal(one, again)
    assert abs(torch.corrcoef(torch.stack((one, other, noise.normal(like(1000))))).triu(1)).max() < 0.15


def test_compiled_code_has_no_generator() -> None:
    noise = Noise(1, CPU)
    compiled = torch.compile(lambda x: x + (noise.generator() is None), backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1
    assert torch.equal(*(torch.rand(3, generator=noise.generator()) for _ in range(2)))
