"""The first steps: leading singular values of directions that are made alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LIKELIHOODS, filled, generator, randn, targets_for
from test_step_oracle import LEARN, PLAIN, check_steps, randomize_
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference, warmup
from fishleg_func.step import FishLegStep
from fishleg_func.warmup import level

RANK, STEPS = 2, 10
WARM = (3, 8, 9)  # step counters: statistics, statistics and a refresh, the last


def spectrum(m: int, n: int, values: Tensor) -> Tensor:
    """Return a matrix of given singular values."""
    left, right = (torch.linalg.qr(randn(size, len(values), seed=size)).Q for size in (m, n))
    return left * values.double() @ right.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (300, 16), (3, 16, 17)])
def test_matrices_of_twice_the_rank_are_levelled_exactly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = randn(*shape).to(dtype)
    before = p.clone()
    expected = reference.level_leading(p, 8)
    torch.testing.assert_close(level(p, 8, 0).double(), expected, rtol=0, atol=2e3 * torch.finfo(dtype).eps)
    assert torch.equal(p, before) and (expected - before).norm() > 0.05 * before.norm()


def test_long_matrices_are_levelled_as_well_as_their_spectrum_allows() -> None:
    falls = spectrum(300, 200, 1 / torch.arange(1.0, 101))
    assert (level(falls, 8, 0) - reference.level_leading(falls, 8)).norm() < 0.01 * falls.norm()
    slow = torch.linalg.svdvals(level(spectrum(300, 200, torch.logspace(0, -2, 100)), 8, 0))
    assert slow[0] < 1.05 * slow[7]
    flat = randn(300, 200)
    before, after = torch.linalg.svdvals(flat), torch.linalg.svdvals(level(flat, 8, 0))
    assert after[0] <= before[0] and after.square().sum().sqrt() == pytest.approx(before.square().sum().sqrt())


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("rank", [1, 3])
def test_what_small_batches_leave_at_rounding_is_not_brought_up(rank: int, size: float) -> None:
    """A matrix of low rank keeps its rank: what is levelled is what there is."""
    values = torch.linspace(3, 1, rank)
    p = size * spectrum(40, 30, values).float()
    after = torch.linalg.svdvals(level(p, 8, 0).double())
    torch.testing.assert_close(
        after[:rank], (size * values.norm() / rank**0.5).double().expand(rank), rtol=1e-5, atol=0
    )
    assert after[rank] < 1e-5 * after[0]


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
def test_zero_stays_and_what_is_not_finite_raises_nothing(bad: float) -> None:
    p = torch.zeros(20, 30)
    p[3, 4] = bad
    assert level(p, 8, 0).isfinite().all() == (bad == 0)
    assert bad or not level(p, 8, 0).any()


def test_after_the_first_steps_nothing_is_levelled() -> None:
    p = randn(20, 30)
    assert not torch.allclose(level(p, 8, STEPS - 1), p)
    after = level(p, 8, STEPS)
    assert torch.equal(after, p) and after.data_ptr() != p.data_ptr()  # an operator's result must not be its argument


class Layers(nn.Module):
    """Layers whose shorter sides are 4, the one that is called last declared first; a gain, and a shorter layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.table, self.into = nn.Linear(5, 4), nn.Embedding(7, 4), nn.Linear(4, 6, bias=False)
        self.gain, self.conv = nn.Parameter(torch.ones(6)), nn.Conv1d(2, 8, 3, groups=2)
        self.middle, self.short = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.into(self.table(x)) * self.gain).tanh()
        h = self.middle(self.conv(h.unflatten(-1, (2, 3))).flatten(-2).tanh())
        return self.out(torch.cat((h, self.short(h.tanh())), -1)[..., -5:].tanh())


def layers(q: str = "kfac", **options: object) -> tuple[FishLegStep, Tensor, Tensor]:
    """Return a step of small layers, and a batch."""
    model, x = filled(Layers()), torch.arange(14) % 7
    y = targets_for(model, x, "gaussian", 0)
    settings = {"lr": 0.05, "damping": 0.05, "generator": generator(0), "update_aux_every": 10, "warmup_rank": RANK}
    return ff.fishlegify(model, LIKELIHOODS["gaussian"], q=q, **settings | options), x, y  # type: ignore[arg-type]


def levelled(step: FishLegStep, x: Tensor, y: Tensor, t: int) -> set[str]:
    """Return the blocks whose step t does not go along their direction."""
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step._t = t
    step(x, y)
    found = set()
    for block in step.plan.blocks:
        moved = {name: p.detach() - before[name] for name, p in step.model.named_parameters()}
        ways = (block.pack(moved).reshape(-1), step._direction[block.name].reshape(-1))
        if torch.cosine_similarity(*ways, dim=0) > -1 + 1e-9:
            found.add(block.name)
    return found


@pytest.mark.parametrize("family", ["kfac", "kronecker", "scaled_kronecker", "eigen", "diagonal", "dense"])
def test_steps_are_the_oracles(family: str) -> None:
    for momentum, t in itertools.product(("nesterov", "before", "after"), WARM):
        step, x, y = layers(family, momentum=momentum)
        randomize_(step)
        check_steps(step, x, y, "gaussian", (t, PLAIN, LEARN), last="out")


def test_all_matrices_are_levelled_and_nothing_else() -> None:
    matrices = {"into", "conv", "middle"}
    for family in ("kfac", "kronecker", "scaled_kronecker", "eigen"):
        assert levelled(*layers(family, momentum="before"), t=3) == matrices, family
    for family in ("diagonal", "dense"):
        assert not levelled(*layers(family, momentum="before"), t=3), family
    assert not levelled(*layers(momentum="before", warmup_rank=3), t=3)
    assert not levelled(*layers(momentum="before", warmup_rank=1), t=3)  # one is like itself
    assert levelled(*layers(momentum="before"), t=STEPS - 1) and not levelled(*layers(momentum="before"), t=STEPS)
    for t, some in ((0, True), (2, True), (3, True), (4, False), (6, True), (9, True), (12, False)):
        assert bool(levelled(*layers(momentum="before", update_aux_every=3), t=t)) == some, t


def test_by_default_eight_are_levelled() -> None:
    for size, chosen in ((15, set()), (16, {"0"})):
        model, x = (
            filled(nn.Sequential(nn.Linear(size, size, bias=False), nn.Tanh(), nn.Linear(size, 1))),
            randn(40, size),
        )
        assert levelled(ff.fishlegify(model, momentum="before"), x, x.sum(1, keepdim=True), t=3) == chosen


@pytest.mark.parametrize("step_norm", [None, "kl"])
def test_steps_that_keep_their_length_are_left_as_they_are(step_norm: str | None) -> None:
    assert not levelled(*layers(momentum="before", step_norm=step_norm), t=3)


def test_rank_zero_levels_nothing() -> None:
    assert not levelled(*layers(momentum="before", warmup_rank=0), t=3)


def test_compiled_code_levels_the_first_steps_only_and_skips_what_is_not_finite() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = randn(20, 4)  # statistics at every second step
    y = x[:, :3].sin()

    def small(rank: int) -> FishLegStep:
        model = filled(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
        return ff.fishlegify(model, LIKELIHOODS["gaussian"], lr=0.05, generator=generator(0), warmup_rank=rank)

    step, eager, plain = small(RANK), small(RANK), small(0)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for t in range(2 * STEPS + 1):
        for model in (plain.model, eager.model):
            model.load_state_dict(step.model.state_dict())
        for other in (plain, eager):
            other.load_state_dict(step.state_dict())
            other(x, y)
        compiled(x, y)
        at = reference.flat_parameters(step.model)
        torch.testing.assert_close(reference.flat_parameters(eager.model), at)
        same = torch.allclose(reference.flat_parameters(plain.model), at, rtol=1e-9, atol=1e-12)
        assert same == (t >= STEPS), t
    step._t = 4
    bad = torch.full_like(y, torch.nan)
    before = reference.flat_parameters(step.model)
    assert compiled(x, bad).isnan() and step.skipped == 1
    assert torch.equal(reference.flat_parameters(step.model), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("value", [-1, 2.0, True, None, "8"])
def test_the_rank_must_be_a_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"warmup_rank=.* must be an integer >= 0; use 8, or 0 for none"):
        ff.fishlegify(nn.Linear(2, 2), warmup_rank=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", ["nesterov", "before", "after"])
def test_a_step_that_fails_to_level_changes_nothing(momentum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for t in (0, 3, 8):
        step, x, y = layers(momentum=momentum)
        step(x, y)
        step._t = t
        before = (step.state_dict(), reference.flat_parameters(step.model))
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(warmup, "level", _fails)
            step(x, y)
        after = (step.state_dict(), reference.flat_parameters(step.model))
        assert before[0].keys() == after[0].keys() and torch.equal(before[1], after[1])
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[0][k])) for k, v in before[0].items())


def _fails(*_: object) -> Tensor:
    raise MemoryError
