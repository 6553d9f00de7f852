"""The bases of the Q families, against closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_qmodules import MAX_DIM, Case, close
from torch import Tensor

from fishleg_func import LowRank
from fishleg_func._trees import dense
from fishleg_func.covariances import eigenbasis, whitening_root
from fishleg_func.families import FAMILIES


def covariance(z: Tensor | LowRank, axis: str) -> Tensor:
    """K-FAC's factors of one batch, for one group."""
    if isinstance(z, LowRank):
        return z.a.mT @ z.a / len(z.a) if axis == "L" else z.d.mT @ z.d
    return (z.mT @ z if axis == "L" else z @ z.mT) / z.norm()


def basis_q(name: str, zs: list[Any], weights: Tensor, damping: float) -> Tensor:
    """Q at λ = identity of one group after batches ``zs``: the inverse of what the family takes for F."""
    dense_zs = torch.stack([dense(z) for z in zs])
    if name == "diagonal":
        return torch.diag(1 / (torch.einsum("t,tmn->mn", weights, dense_zs**2) + damping).reshape(-1))
    zs = dense_zs if name == "embedding" else zs
    cov = {axis: sum(w * covariance(z, axis) for w, z in zip(weights, zs, strict=True)) for axis in "LR"}
    cov["R"] = torch.diag(cov["R"].diagonal()) if name == "embedding" else cov["R"]
    eye = {axis: torch.eye(len(x)).double() for axis, x in cov.items()}
    sizes = {1: 1, 2: 2, 3: 3, 4: 1, 5: 1} if name == "eigen" else {1: 1, 2: 2, 3: 3, 4: 2, 5: 3}
    block = {axis: torch.arange(len(x)) // sizes[len(x)] for axis, x in cov.items()}
    cov = {axis: x * (block[axis][:, None] == block[axis]) for axis, x in cov.items()}  # long sides in blocks
    if name == "eigen":
        return torch.linalg.inv(torch.kron(cov["R"], cov["L"]) + damping * torch.kron(eye["R"], eye["L"]))
    pi = math.sqrt(cov["L"].diagonal().mean() / cov["R"].diagonal().mean())
    rho = {"L": math.sqrt(damping) * pi, "R": math.sqrt(damping) / pi}
    K = {axis: torch.linalg.inv(cov[axis] + rho[axis] * eye[axis]) for axis in "LR"}
    return torch.kron(K["R"], K["L"])


@pytest.mark.parametrize("name", ["kfac", "eigen", "diagonal", "embedding"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 4), (2, 3, 2), (2, 2, 5)])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("batches", "rate"), [(1, 0.05), (20, 0.05), (25, 0.05), (25, 0.01), (5, 0.4)])
def test_basis_is_that_of_the_running_mean(
    name: str, shape: tuple[int, ...], factored: bool, batches: int, rate: float
) -> None:
    case = Case(name, FAMILIES[name](shape, max_dim=MAX_DIM, dtype=torch.float64), torch.Generator().manual_seed(3))
    zs = [case.probe(factored=factored, rows=4) for _ in range(batches)]
    for z in zs:
        case.q.gather_(z, rate=rate)
    close(case.q.dense(), torch.eye(math.prod(shape)), case)  # until it is refreshed
    case.q.refresh_(torch.tensor(0.3, dtype=torch.float64))
    weights = torch.ones(1, dtype=torch.float64)
    for k in range(2, batches + 1):  # a plain mean at first, exponential later
        newest = torch.full((1,), max(1 / k, rate), dtype=torch.float64)
        weights = torch.cat((weights * (1 - newest), newest))
    groups = range(shape[0]) if len(shape) == 3 else [...]
    parts = [[LowRank(z.d[g], z.a[g]) if factored else z[g] for z in zs] for g in groups]
    close(case.q.dense(), torch.block_diag(*(basis_q(name, part, weights, 0.3) for part in parts)), case)


def test_whitening_root_keeps_the_basis_where_the_factorization_fails() -> None:
    cov = torch.stack((4 * torch.eye(2), -torch.eye(2), torch.full((2, 2), math.nan)))
    root = whitening_root(cov, torch.zeros(3), previous=7 * torch.ones(3, 2, 2))
    assert torch.equal(root, torch.stack((0.5 * torch.eye(2), 7 * torch.ones(2, 2), 7 * torch.ones(2, 2))))
    kept = whitening_root(
        torch.eye(40).expand(2, 40, 40), torch.tensor([math.inf, 3.0]), previous=torch.ones(2, 40, 40)
    )
    assert torch.equal(kept, torch.stack((torch.ones(40, 40), 0.5 * torch.eye(40))))  # π overflows where d is all zero
    cov = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    root = whitening_root(cov, torch.tensor(0.5), previous=torch.zeros(2, 2))
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(cov + 0.5 * torch.eye(2)))
    assert torch.equal(root, root.triu())


def dead_units(n: int, seed: int) -> torch.Tensor:
    """Second moments ``[n, n]`` of few examples of n units on all scales, most of which are dead, as after a ReLU."""
    g = torch.Generator().manual_seed(seed)
    units = torch.randn(n // 3, n, generator=g) * 10 ** torch.empty(n).uniform_(-3, 0, generator=g)
    units[:, torch.rand(n, generator=g) < 0.6] = 0
    return units.mT @ units


@pytest.mark.parametrize("lapack_fails", ["where it does", "raises", "returns NaN"])
@pytest.mark.parametrize(("n", "seed"), [(700, 10), (1000, 6), (2, 0)])
def test_eigenbasis_of_dead_units(n: int, seed: int, lapack_fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cov = torch.stack((dead_units(n, seed), torch.eye(n)))  # LAPACK does fail on some of them
    if lapack_fails != "where it does":
        monkeypatch.setattr(torch.linalg, "eigh", double_only(torch.linalg.eigh, raises=lapack_fails == "raises"))
    vectors = eigenbasis(cov, torch.zeros_like(cov))
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n).expand(2, n, n), rtol=0, atol=1e-5)
    rotated = vectors.mT @ cov @ vectors
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert rest.abs().max() < 1e-5 * cov.abs().max()


def double_only(solver: Callable[..., Any], raises: bool) -> Callable[..., Any]:
    """A solver that fails in float32, as LAPACK's do on different machines."""

    def solve(a: torch.Tensor) -> Any:
        if a.dtype == torch.float32 and raises:
            raise torch.linalg.LinAlgError("it did not converge")
        values, vectors = solver(a)
        return (values, vectors) if a.dtype == torch.float64 else (values, vectors * math.nan)

    return solve


def test_eigenbasis_keeps_what_it_has_of_statistics_that_overflow() -> None:
    cov = torch.stack((torch.diag(torch.tensor([2.0, 1.0])), torch.full((2, 2), math.inf)))
    vectors = eigenbasis(cov, 7 * torch.ones(2, 2, 2))
    assert torch.equal(vectors[0].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(vectors[1], 7 * torch.ones(2, 2))
    for entry in (math.inf, -math.inf, math.nan):
        q = FAMILIES["eigen"]((3, 2))
        q.gather_(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
        q.refresh_(torch.tensor(1.0))
        before = q.dense()
        q.cov_R[0, 0] = entry
        q.refresh_(torch.tensor(1.0))
        torch.testing.assert_close(q.dense(), before)


@pytest.mark.parametrize("name", ["kfac", "eigen", "diagonal", "embedding"])
def test_basis_of_singular_statistics_is_finite(name: str) -> None:
    for z in (torch.ones(3, 3), torch.zeros(3, 3)):
        q = FAMILIES[name]((3, 3))
        q.gather_(1e3 * z)
        q.refresh_(torch.tensor(1e-8))
        assert q.dense().isfinite().all()
        assert (torch.ones(3, 3) * dense(q(torch.ones(3, 3)))).sum() > 0
