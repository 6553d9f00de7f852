"""One contract for all Q families: a new one inherits it through ``FAMILIES`` and adds its dense definition."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import basis_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from fishleg_func import LowRank, QModule, families, reference
from fishleg_func._trees import dense
from fishleg_func.qmodules import Gradients
from fishleg_func.spiked import Spiked

FAMILIES = {**families.FAMILIES, "spiked": functools.partial(Spiked, rank=1)}
MAX_DIM = 3  # longer sides become block-diagonal, and 5 and 7 are padded


@dataclasses.dataclass(frozen=True)
class Case:
    """A family at a random λ and basis: all that a check needs."""

    name: str
    q: QModule
    source: torch.Generator

    @property
    def dtype(self) -> torch.dtype:
        return next(self.q.parameters()).dtype

    @property
    def lam(self) -> dict[str, Tensor]:
        return {key: p.detach() for key, p in self.q.named_parameters()}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, generator=self.source)

    def probe(self, *, factored: bool = False, rows: int = 2) -> Tensor | LowRank:
        *groups, m, n = self.q.shape
        if factored:
            return LowRank(self.randn(*groups, rows, m), self.randn(*groups, rows, n))
        return self.randn(*self.q.shape)


def oracle(case: Case, lam: dict[str, Tensor] | None = None) -> Tensor:
    """The dense definition of a family, ``[P, P]`` in float64: what a new family has to add."""
    lam = case.lam if lam is None else lam
    if case.name == "spiked":
        return spiked(case.q.get_buffer("V"), case.q.get_buffer("c"), lam["s"])
    return reference.dense_q(case.name, lam, basis_of(case.q, case.name), shape=case.q.shape)


def spiked(V: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """V diag(d²) Vᵀ + d² (I - V Vᵀ), the last of d across V; one block for each group."""
    if V.ndim == 3:
        return torch.block_diag(*map(spiked, V, c, s))
    V, squares = V.double(), (c.double() * s.double().exp()) ** 2
    return V @ torch.diag(squares[:-1]) @ V.T + squares[-1] * (torch.eye(len(V)) - V @ V.T)


def close(actual: Tensor | LowRank, expected: Tensor, case: Case) -> None:
    actual, expected = dense(actual).double(), expected.double()
    tolerance = 1e-9 if case.dtype == torch.float64 else 2e-4
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def invertible(shape: torch.Size, source: torch.Generator, log_condition: float) -> Tensor:
    """Random matrices with singular values from 1 to ``10 ** -log_condition``."""
    left, right = (torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=source))[0] for _ in range(2))
    values = 10 ** (-log_condition * torch.rand(shape[:-1], dtype=torch.float64, generator=source))
    return left @ (values.unsqueeze(-1) * right)


def decoupled(x: Tensor, dim: int) -> Tensor:
    """``x`` with the identity at the padding of a long side: training never moves it (see the walks below)."""
    size = x.shape[-1]
    kept = (torch.arange(x.shape[-3] * size) < dim).view(-1, size) if size < dim else torch.arange(size) < dim
    return torch.where(kept.unsqueeze(-1) & kept.unsqueeze(-2), x, torch.eye(size).to(x))


def build(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, log_condition: float, max_dim: int = MAX_DIM
) -> Case:
    source = torch.Generator().manual_seed(seed)
    most = math.prod(shape[-2:])
    given = {"rank": 1 + seed % most} if name == "spiked" else {}
    q = FAMILIES[name](shape, max_dim=math.prod(shape) if name == "dense" else max_dim, dtype=dtype, **given)
    case = Case(name, q, source)
    if isinstance(q, Spiked):
        V = torch.linalg.qr(torch.randn(*q.V.shape, dtype=torch.float64, generator=source)).Q
        q.place_(V, 10 ** (-log_condition * torch.rand(q.c.shape, dtype=torch.float64, generator=source)))
    for k in range(2):
        q.gather_(case.probe(factored=k == 0))
    q.refresh_(torch.tensor(0.5, dtype=dtype))
    for key, p in q.named_parameters():
        if key == "s":
            p.data.copy_(0.3 * (1 + log_condition) * case.randn(*p.shape))
        else:
            dim = p.shape[-1] if name == "dense" else shape[-1] if key == "L" else shape[-2]
            p.data.copy_(decoupled(invertible(p.shape, source, log_condition), dim))
    return case


@st.composite
def cases(draw: st.DrawFn, name: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Case:
    side = st.integers(1, 5 if name != "dense" else 3)
    shape = (draw(side), draw(side))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 3)), *shape)
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**31))
    return build(name, shape, dtype, seed, log_condition=draw(st.sampled_from([0.0, 0.5, 1.5])))


# --- the contract: what holds at any λ ---


def check_dense_definition(case: Case) -> None:
    assert case.q.dense().dtype == case.dtype
    close(case.q.dense(), oracle(case), case)


def check_symmetric_positive_definite(case: Case) -> None:
    Q = case.q.dense().double()
    close(Q, Q.mT, case)
    if case.dtype == torch.float64:  # float32 rounds the smallest eigenvalues away
        assert torch.linalg.eigvalsh(Q).min() > 0
    for u in [case.probe() for _ in range(5)]:
        assert (u * case.q(u)).sum() > 0


def check_linear(case: Case) -> None:
    u, v = case.probe(), case.probe()
    close(case.q(2 * u - 3 * v), 2 * case.q(u) - 3 * case.q(v), case)
    out = case.q(u)
    assert (out.dtype, out.shape) == (u.dtype, u.shape)
    close(out.reshape(-1), case.q.dense() @ u.reshape(-1), case)


def check_diagonal(case: Case) -> None:
    close(case.q.diagonal(), oracle(case).diagonal().reshape(case.q.shape), case)


def check_whiten_and_color_are_transposes(case: Case) -> None:
    u, z, roots = case.probe(), case.probe(), case.q.roots()
    u_z, Bz = dense(case.q.whiten(roots, u)), dense(case.q.color(roots, z))
    close((u_z * z).sum(), (u * Bz).sum(), case)


def root(case: Case) -> Tensor:
    eye = torch.eye(math.prod(case.q.shape), dtype=case.dtype).reshape(-1, *case.q.shape)
    return torch.stack([case.q.sqrt(e).reshape(-1) for e in eye], 1)


def check_sqrt(case: Case) -> None:
    close(root(case) @ root(case).mT, oracle(case), case)


def check_scale(case: Case) -> None:
    before = oracle(case)
    case.q.scale_(2.5)
    close(case.q.dense(), 2.5 * before, case)
    case.q.scale_(torch.tensor(0.4, dtype=torch.float64))
    close(case.q.dense(), before, case)


def check_factored_probe(case: Case) -> None:
    u = case.probe(factored=True)
    close(case.q(u), case.q(dense(u)), case)


def check_operator(case: Case) -> None:
    u = case.probe(factored=True)
    for form in (u, dense(u)):
        close(dense(case.q.act(case.q.operator(), form)), case.q(dense(u)), case)


def check_functional_call(case: Case) -> None:
    other = {key: 1.1 * x for key, x in case.lam.items()}
    u, before = case.probe(), {key: x.clone() for key, x in case.lam.items()}
    close(functional_call(case.q, other, (u,)).reshape(-1), oracle(case, other) @ u.double().reshape(-1), case)
    assert all(torch.equal(before[key], x) for key, x in case.lam.items())


def check_batches_broadcast(case: Case) -> None:
    u = case.randn(2, 3, *case.q.shape)
    close(case.q(u), torch.stack([torch.stack([case.q(x) for x in row]) for row in u]), case)


CHECKS = [check for key, check in list(globals().items()) if key.startswith("check_")]
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@given(data=st.data())
def test_contract(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    for check in CHECKS:
        check(case)


@every_family
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 1, 1), (2, 7, 2)])
def test_contract_at_the_edges(name: str, shape: tuple[int, ...]) -> None:
    case = build(name, shape, torch.float64, 0, 0.5)
    for check in CHECKS:
        check(case)


# --- relative gradients and the step along them ---


def relative_by_autograd(case: Case, u: Tensor, w: Tensor) -> dict[str, Tensor]:
    lam = {key: x.clone().requires_grad_() for key, x in case.lam.items()}
    value = w.reshape(-1) @ oracle(case, lam) @ u.reshape(-1)
    slopes = dict(zip(lam, torch.autograd.grad(value, list(lam.values())), strict=True))
    product = {"L": lambda L, d: L.mT @ d, "R": lambda R, d: d @ R.mT, "s": lambda s, d: d}
    return {key: product[key](x.detach(), slopes[key]) for key, x in lam.items()}


def relative(case: Case, u: Tensor | LowRank, w: Tensor | LowRank) -> Gradients:
    q, operator = case.q, case.q.operator()
    return q.relative(operator, u, q.act(operator, u), w)


def check_relative(case: Case, factored: tuple[bool, bool] = (False, False)) -> None:
    u, w = (case.probe(factored=f, rows=2 + k) for k, f in enumerate(factored))
    actual, expected = relative(case, u, w), relative_by_autograd(case, dense(u), dense(w))
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        close(dense(actual[key]), x, case)


def check_retract(case: Case, rows: int | None = None) -> None:
    u, w = (case.probe(factored=rows is not None, rows=rows or 0) for _ in range(2))
    operator, factored = case.q.operator(), relative(case, u, w)
    gradients = {key: dense(g) for key, g in factored.items()}
    # the reference takes plain gradients: d, where G = L^T d or d R^T
    solve = {"L": lambda x, g: torch.linalg.solve(x.mT, g), "R": lambda x, g: torch.linalg.solve(x.mT, g, left=False)}
    plain = {key: solve[key](case.lam[key], g) if key in solve else g for key, g in gradients.items()}
    family = "diagonal" if case.name == "spiked" else case.name  # s moves alike
    expected = reference.relative_update(family, case.lam, plain, 0.2)
    case.q.retract_(operator, factored, torch.tensor(0.2, dtype=torch.float64))
    for key, x in expected.items():
        close(case.lam[key], x, case)
    v = case.probe()
    close(case.q.act(operator, v), case.q(v), case)  # moved along with λ


@every_family
@given(data=st.data(), factored=st.sampled_from([(False, False), (True, True), (True, False), (False, True)]))
def test_relative_gradients_and_the_step_along_them(
    name: str, data: st.DataObject, factored: tuple[bool, bool]
) -> None:
    case = data.draw(cases(name, (torch.float64,)))
    check_relative(case, factored)
    check_retract(case)


@every_family
def test_nothing_changes_where_not_ok(name: str) -> None:
    case, no = build(name, (2, 3, 2), torch.float64, 0, 0.5), torch.tensor(False)
    before = {key: x.clone() for key, x in case.q.state_dict().items()}
    gradients = relative(case, case.probe(), case.probe())
    operator = case.q.operator()
    kept = [t.clone() for t in operator]
    broken = {key: dense(g) * math.nan for key, g in gradients.items()}
    case.q.retract_(operator, broken, torch.tensor(0.2), no)
    case.q.gather_(case.probe() * math.nan, no)
    assert all(torch.equal(before[key], x) for key, x in case.q.state_dict().items())
    assert all(map(torch.equal, kept, operator))
    case.q.retract_(operator, gradients, torch.tensor(0.2), ~no)
    case.q.gather_(case.probe(), ~no)
    assert not any(torch.equal(before[key], case.q.state_dict()[key]) for key in gradients)
    assert not case.q.has_basis or case.q.count == before["count"] + 1


def walk_(case: Case, adam: bool) -> None:
    u, w = case.probe(), case.probe()
    if not adam:
        return case.q.retract_(case.q.operator(), relative(case, u, w), torch.tensor(0.2))
    lam = {key: x.requires_grad_() for key, x in case.lam.items()}
    slopes = torch.autograd.grad((w * dense(functional_call(case.q, lam, (u,)))).sum(), list(lam.values()))
    for p, slope in zip(case.q.parameters(), slopes, strict=True):
        p.data.sub_(0.01 * slope.sign())  # what Adam's first step is


@every_family
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize("adam", [False, True], ids=["relative", "adam"])
def test_stays_positive_definite(name: str, shape: tuple[int, ...], adam: bool) -> None:
    case = build(name, shape, torch.float32, 1, 0.0)
    for _ in range(300):
        walk_(case, adam)
    for u in [case.probe() for _ in range(20)]:
        assert (u * dense(case.q(u))).sum() > 0
    case.q.double()  # Q = B B^T is positive definite where B is invertible, and float64 rounds B no further
    if isinstance(case.q, Spiked):
        case.q.V.copy_(torch.linalg.qr(case.q.V).Q)  # orthonormal to float64 as well
    assert torch.linalg.cond(root(case)) < 1e6
    close(root(case) @ root(case).mT, oracle(case), case)  # padding is still decoupled


@pytest.mark.parametrize("name", ["scaled_kronecker", "eigen", "diagonal", "embedding", "spiked"])
@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_saturated_scales_stay_positive_definite(name: str, far: float) -> None:
    case = build(name, (2, 3), torch.float32, 0, 0.0)
    case.q.get_parameter("s").data.fill_(far)
    assert case.q.diagonal().isfinite().all() and (case.q.diagonal() > 0).all()


@every_family
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 0), (2, 2, 2, 2)])
def test_bad_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape=.* must be \(m, n\) or \(groups, m, n\).*pack"):
        FAMILIES[name](shape)
    with pytest.raises(ValueError, match=r"12 x 12.*<= 11.*kfac"):
        FAMILIES["dense"]((3, 4), max_dim=11)


@every_family
def test_starts_at_the_identity(name: str) -> None:
    q = FAMILIES[name]((2, 3)).double()
    assert torch.equal(q.dense(), torch.eye(6).double())
    assert not any(p.requires_grad for p in q.parameters())
    assert "(2, 3)" in repr(q) and isinstance(q.flops(), int) and q.flops() > 0
    with pytest.raises(ValueError, match=r"factor=-1.0 must be > 0"):
        q.scale_(-1.0)


# --- a check that cannot fail is none: each is given a family that breaks it ---

MUTATIONS: dict[Callable[..., None], tuple[str, Callable[..., Any]]] = {
    check_dense_definition: ("color", lambda self, roots, z: z),
    check_symmetric_positive_definite: ("forward", lambda self, u: -u),
    check_linear: ("forward", lambda self, u: u.abs()),
    check_diagonal: ("diagonal", lambda self: torch.ones(self.shape, dtype=torch.float64)),
    check_whiten_and_color_are_transposes: ("color", lambda self, roots, z: z),
    check_sqrt: ("sqrt", lambda self, z: z),
    check_scale: ("scale_", lambda self, factor: None),
    check_factored_probe: ("forward", lambda self, u: u.d.mT @ u.a if isinstance(u, LowRank) else 2 * u),
    check_operator: ("operator", lambda self: tuple(2 * t for t in type(self).__bases__[0].operator(self))),
    check_functional_call: ("forward", lambda self, u: u),
    check_batches_broadcast: ("forward", lambda self, u: u - u.mean(0)),
    check_relative: ("relative", lambda self, *given: dict(self.named_parameters())),
    check_retract: ("retract_", lambda self, operator, gradients, rate: None),
}


@every_family
@pytest.mark.parametrize("check", [*CHECKS, check_relative, check_retract], ids=lambda check: check.__name__)
def test_each_check_fails_on_a_broken_family(name: str, check: Callable[[Case], None]) -> None:
    method, replacement = MUTATIONS[check]
    case = build(name, (3, 2), torch.float64, 0, 0.5)
    check(case)
    case.q.__class__ = type("Broken", (type(case.q),), {method: replacement})
    with pytest.raises(AssertionError):
        check(case)
