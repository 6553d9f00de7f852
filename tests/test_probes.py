"""Probes of λ: Gaussian ones and their rank, and which are the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, from_packed, randn
from test_auxiliary import check_updates, learner
from torch import Tensor

import fishleg_func as ff
from fishleg_func import blocks
from fishleg_func._noise import Noise
from fishleg_func._types import LowRank
from fishleg_func.blocks import gaussian
from fishleg_func.step import FishLegStep

CPU = torch.device("cpu")


def test_a_gaussian_probe_of_long_sides_has_few_rows_and_the_second_moment_of_a_normal_one() -> None:
    noise, like, x = Noise(0, CPU), torch.empty(2, 130, 130), randn(2, 1, 130).float()
    draws = []
    for salt in range(400):
        u = gaussian(like, noise, salt)
        assert isinstance(u, LowRank) and u.d.shape == u.a.shape == (2, 16, 130)
        draws.append(torch.stack(((x @ u.d.mT @ u.a @ x.mT).flatten(), u.dense().square().sum((-2, -1)))))
    along, squares = torch.stack(draws, 1)  # of each group
    expected = x.square().sum(-1).square().flatten()
    assert (along.mean(0) / expected.sqrt()).abs().max() < 0.2
    torch.testing.assert_close(along.square().mean(0), expected, rtol=0.3, atol=0)
    torch.testing.assert_close(squares.mean(0), torch.full((2,), 130.0**2), rtol=0.02, atol=0)
    correlation = (along[:, 0] * along[:, 1]).mean() / expected.prod().sqrt()
    assert abs(correlation) < 0.2  # groups are independent, as are draws: their mean is small


def test_a_gaussian_probe_of_a_short_side_is_normal() -> None:
    noise, like = Noise(0, CPU), torch.empty(127, 300)
    assert torch.equal(gaussian(like, noise, 3), noise.normal(like, 3))


def test_update_aux_with_gaussian_probes_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_PROBE_SIDE", 4)
    monkeypatch.setattr(blocks, "_PROBE_ROWS", 2)
    step, x, y = learner("mlp", "categorical", "kfac")
    few = [name for name, q in step.q.items() if min(q.shape[-2:]) >= 4]
    assert 0 < len(few) < len(step.q)

    def draw(step: FishLegStep) -> Tensor:
        noise, draws = step._noise.fork(3), {}
        for i, (name, p) in enumerate(step._direction.items()):
            d, a = (noise.fork(k).normal(p.new_empty(2, side), i) for k, side in enumerate(p.shape))
            draws[name] = d.mT @ a / 2**0.5 if name in few else noise.normal(p, i)
        return from_packed(step.model, draws)

    check_updates(step, x, y, "categorical", draw=draw)


PROBES = [
    ("kfac", None, "gaussian"), ("eigen", None, "gaussian"), ("kfac", 5, "gaussian"), ("kronecker", None, "gradient"),
    ({"0": "kronecker", "*": "kfac"}, None, "gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "every", "expected"), PROBES)
def test_probes_are_gaussian_by_default_unless_a_family_starts_from_the_identity(
    family: Any, every: int | None, expected: str
) -> None:
    step = ff.fishlegify(CASES["mlp"].model(), q=family, update_aux_every=every)
    assert step._options.u == expected
    assert ff.fishlegify(CASES["mlp"].model(), q=family, u="momentum")._options.u == "momentum"
