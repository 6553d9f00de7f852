"""The auxiliary update: its gradients against autograd through dense matrices, the whole of it against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    LIKELIHOODS,
    SIGMA,
    assert_close,
    assert_same,
    basis_of,
    blocks_of,
    dense_q,
    drawn,
    filled,
    from_packed,
    generator,
    lam_of,
    randn,
    randomize_,
    randomize_q_,
    snapshot,
    targets_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fisher import Trap
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import auxiliary, reference
from fishleg_func._trees import dense
from fishleg_func.families import FAMILIES
from fishleg_func.step import FishLegStep

PARTNERS = ("lowrank", "same input", "dense")
RATES = {"relative": 0.3, "adam": 0.02}


def packed(shape: tuple[int, ...], rows: int, seed: int) -> ff.LowRank:
    *groups, m, n = shape
    return ff.LowRank(randn(*groups, rows, m, seed=seed), randn(*groups, rows, n, seed=seed + 1))


def check_gradients(
    family: str, shape: tuple[int, ...], rows: int, partner: str, dense_u: bool, seed: int, max_dim: int = 4096
) -> None:
    """Compare both forms of the gradient of <w, Q u> in λ with autograd through the oracle's dense Q."""
    kind = FAMILIES[family]
    q = kind(shape, dtype=torch.float64, **({} if family == "dense" else {"max_dim": max_dim}))
    randomize_q_(q, seed)
    u, w = packed(shape, rows, seed + 2), packed(shape, rows + 1, seed + 4)
    if partner == "same input":
        w = ff.LowRank(packed(shape, rows, seed + 4).d, u.a)
    u_given, w_given = u.dense() if dense_u else u, w.dense() if partner == "dense" else w
    lam = {k: p.detach().clone().requires_grad_() for k, p in q.named_parameters()}
    basis = basis_of(q, family)
    value = w.dense().reshape(-1) @ reference.dense_q(family, lam, basis, shape=shape) @ u.dense().reshape(-1)
    slopes = dict(zip(lam, torch.autograd.grad(value, list(lam.values())), strict=True))
    relative = {
        k: d if k == "s" else lam[k].mT @ d if k == "L" else d @ lam[k].mT  # Lᵀ∂L, ∂R Rᵀ, ∂s
        for k, d in slopes.items()
    }
    operator = q.operator()
    found = q.relative(operator, u_given, q.act(operator, u_given), w_given)
    actual = {k: dense(g) for k, g in found.items()}
    by_autograd = auxiliary.gradient(q, u_given, w_given)
    assert set(actual) == set(by_autograd) == set(slopes)
    for k in slopes:
        assert_close(by_autograd[k], slopes[k], 1e-8, f"{family}.{k}")
        assert_close(actual[k], relative[k], 1e-8, f"{family}.{k}, relative")


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("dense_u", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_factored_gradients_in_all_row_regimes(family: str, dense_u: bool, partner: str, rows: int) -> None:
    check_gradients(family, (7, 4), rows, partner, dense_u, seed=rows)


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    groups=st.sampled_from([(), (1,), (2,)]),
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    rows=st.integers(1, 9),
    partner=st.sampled_from(PARTNERS),
    dense_u=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_factored_gradients_of_any_shape(
    family: str, groups: tuple[int, ...], sides: tuple[int, int], rows: int, partner: str, dense_u: bool, seed: int
) -> None:
    if family == "dense" and groups:
        groups = ()  # one matrix over all groups: the oracle has one for each
    check_gradients(family, (*groups, *sides), rows, partner, dense_u, seed)


@pytest.mark.parametrize("family", ["kronecker", "kfac", "scaled_kronecker", "embedding"])
@pytest.mark.parametrize("dense_u", [False, True])
def test_factored_gradients_of_long_sides(family: str, dense_u: bool) -> None:
    """Hold them where a side is block-diagonal; 6 columns make two blocks, without padding."""
    check_gradients(family, (2 if family == "embedding" else 4, 6), 3, "lowrank", dense_u, seed=0, max_dim=4)


def learner(
    case: str, likelihood: str, family: str, rule: str = "relative", **options: object
) -> tuple[FishLegStep, Tensor, Tensor]:
    """Return a step with random λ and bases, and a batch."""
    model, x = CASES[case].model(), CASES[case].inputs()
    y = targets_for(model, x, likelihood)
    options = {"aux_rule": rule, "aux_lr": RATES[rule], "damping": 0.05, "q": family, "step_norm": None} | options
    step = ff.fishlegify(model, LIKELIHOODS[likelihood], generator=generator(0), **options)  # type: ignore[arg-type]
    randomize_(step)
    step._updates = 1  # the first update of all would refresh the bases
    return step, x, y


def check_updates(
    step: FishLegStep, x: Tensor, y: Tensor, likelihood: str, count: int = 3,
    draw: Callable[[FishLegStep], Tensor] = drawn, **options: object,
) -> None:  # fmt: skip
    """Compare ``count`` consecutive calls of update_aux, loss and change of λ, with the oracle."""
    moments: dict[str, reference.Moments] = {}
    gaussian, seen = step._options.u == "gaussian", []
    for number in range(1, count + 1):
        old, probe = lam_of(step), draw(step) if gaussian else None
        assert probe is None or not any(torch.equal(probe, other) for other in seen)
        seen.append(probe)
        value = step.update_aux(x, y)
        out = reference.training_step(
            step.model, x, y, likelihood, blocks_of(step, old), sigma=SIGMA, learn=True,
            momentum=from_packed(step.model, step._averages.momentum()),
            lr=0.0, beta=0.0, weight_decay=0.0, step_norm=None,
            damping=step.hyper.damping.item(), aux_rule=step._options.aux_rule, aux_lr=step.hyper.aux_lr.item(),
            precondition_aux=step._options.precondition_aux, aux_step=number, moments=moments,
            scale_free=step._options.step_norm == "layer" and not step._options.precondition_aux and not gaussian,
            probe=probe, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        moments = out.moments
        assert out.auxiliary_loss is not None
        assert_close(value, out.auxiliary_loss, 1e-8, "A")
        for name, new in lam_of(step).items():
            for k in new:
                moved, expected = new[k] - old[name][k], out.blocks[name].lam[k] - old[name][k]
                assert_close(moved, expected, 1e-8, f"update {number} of {name}.{k}")


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "embedding"])
@pytest.mark.parametrize("step_norm", [None, "layer"])
def test_update_aux_is_the_oracle_for_each_family(
    step_norm: str | None, family: str, preconditioned: bool, rule: str
) -> None:
    step, x, y = learner("mlp", "categorical", family, rule, precondition_aux=preconditioned, step_norm=step_norm)
    check_updates(step, x, y, "categorical")


CROSS = [
    (case, likelihood, family)
    for i, case in enumerate(CASES)
    for likelihood, family in [
        (list(LIKELIHOODS)[i % 4], "kfac"),
        (list(LIKELIHOODS)[(i + 1) % 4], "kronecker"),
        (list(LIKELIHOODS)[(i + 2) % 4], "eigen"),
    ]
]


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize(("case", "likelihood", "family"), CROSS)
def test_update_aux_is_the_oracle_for_each_model(case: str, likelihood: str, family: str, rule: str) -> None:
    step, x, y = learner(case, likelihood, family, rule)
    if case == "embedding":
        assert type(step.q["0.weight"]).__name__ == "Embedding"
    check_updates(step, x, y, likelihood, count=2)


@pytest.mark.parametrize("case", ["mlp", "twice", "sequence"])
@pytest.mark.parametrize("batch", [1, 40])
def test_update_aux_is_the_oracle_with_few_and_with_many_rows(case: str, batch: int) -> None:
    """Hold that both representations of a gradient are met, and give the same."""
    step, _, _ = learner(case, "gaussian", "kfac")
    x = CASES[case].inputs(batch)
    y = targets_for(step.model, x, "gaussian")
    gradient = step._runner.run(x, y, twice=False).gradient()[1]
    kinds = {type(u) for name, u in gradient.items() if step.q[name].m > 1}
    if case != "sequence":
        assert kinds == {ff.LowRank if batch == 1 else Tensor}
    check_updates(step, x, y, "gaussian", count=2)


@pytest.mark.parametrize("rule", RATES)
def test_update_aux_refreshes_the_bases_before_it_learns(rule: str) -> None:
    step, x, y = learner("mlp", "bernoulli", "kfac", rule)
    step._updates, before = 0, blocks_of(step)
    check_updates(step, x, y, "bernoulli", count=3)  # the oracle is handed the basis after each update
    assert (blocks_of(step)["0"].basis["C_L"] - before["0"].basis["C_L"]).norm() > 1e-3  # type: ignore[index]


def test_update_aux_with_the_empirical_fisher_and_other_probes() -> None:
    step, x, y = learner("twice", "categorical", "kronecker", fisher="empirical")
    S = reference.score_fisher(step.model, x, y, "categorical")
    check_updates(step, x, y, "categorical", count=2, curvature=S)
    step, x, y = learner("mlp", "gaussian", "kronecker", u="gaussian")
    check_updates(step, x, y, "gaussian")


def test_update_aux_without_targets_takes_the_gradient_of_the_last_step() -> None:
    step, x, y = learner("mlp", "gaussian", "kronecker")
    with pytest.raises(ValueError, match=r"targets=None must be given with u='gradient' before the first step"):
        step.update_aux(x)
    step._t = 51
    step(x, y)
    twin = copy.deepcopy(step.model)
    other = CASES["mlp"].inputs(seed=9)
    old, g = lam_of(step), torch.autograd.grad(LIKELIHOODS["gaussian"].nll(twin(x), y), list(twin.parameters()))
    value = step.update_aux(other)
    u = torch.cat([t.reshape(-1) for t in g])
    out = reference.training_step(
        step.model, other, torch.zeros(5, 3).double(), "gaussian", blocks_of(step, old), sigma=SIGMA, learn=True,
        momentum=u, lr=0.0, beta=0.0, weight_decay=0.0, step_norm=None, damping=0.05, aux_lr=0.3, probe=u,
    )  # fmt: skip
    assert_close(value, out.auxiliary_loss, 1e-8, "A")  # type: ignore[arg-type]
    assert_close(lam_of(step)["0"]["L"], out.blocks["0"].lam["L"], 1e-8)


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_at_the_exact_inverse_the_loss_is_least_and_nothing_moves(rule: str, preconditioned: bool) -> None:
    """Hold A = -1/2 uᵀ(F + γI)⁻¹u and w = 0; the original logged v·(Av - u), zero there."""
    model, x = filled(nn.Linear(3, 2)), randn(6, 3)
    y = targets_for(model, x, "poisson")
    F, gamma = reference.fisher(model, x, "poisson"), 0.05
    where = reference.block_indices(model)["(root)"][0]
    inverse = reference.damped_inverse(F, gamma)[where[:, None], where]
    step = ff.fishlegify(
        model, LIKELIHOODS["poisson"], q="dense", damping=gamma, aux_rule=rule, aux_lr=RATES[rule],
        precondition_aux=preconditioned, aux_eps=1e-4,
    )  # fmt: skip
    step.q["(root)"].L.copy_(torch.linalg.cholesky(inverse))
    step._curvature.renew()
    before = lam_of(step)["(root)"]["L"]
    value = step.update_aux(x, y)
    twin = copy.deepcopy(model)
    g = torch.autograd.grad(LIKELIHOODS["poisson"].nll(twin(x), y), list(twin.parameters()))
    u = torch.cat([t.reshape(-1) for t in g])[where]
    size = (u @ inverse @ u).sqrt() if rule == "relative" else u.norm()
    assert_close(value, -0.5 * (u @ inverse @ u) / size**2, 1e-10, "A")
    after = lam_of(step)["(root)"]["L"]
    assert (after - before).norm() <= 1e-9 * before.norm()
    batch = step._runner.run(x, y, twice=True)
    found = auxiliary.probe(
        step.q, step._curvature.operators, batch.gradient()[1], batch.fisher("exact", step._noise),
        {"(root)": step.hyper.damping},
        unit=rule, preconditioned=preconditioned,
    )  # fmt: skip
    w, u = dense(found.w["(root)"]), dense(found.u["(root)"])
    assert u.norm() > 1e-3 and w.norm() <= 1e-10 * u.norm()


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize("family", ["kfac", "scaled_kronecker", "dense"])
def test_a_zero_gradient_changes_nothing(family: str, rule: str) -> None:
    """Hold it before and after other updates, whose Adam moments must not act on their own; no NaN, no 0/0."""
    step, x, y = learner("mlp", "gaussian", family, rule, u="gradient")
    exact = copy.deepcopy(step.model)(x).detach()  # no residual
    for _ in range(2):
        step._updates, before = 1, lam_of(step)
        value = step.update_aux(x, exact)
        assert value.item() == 0.0
        assert_same(before, lam_of(step))
        step.update_aux(x, y)
        assert lam_of(step)["0"]["L"].isfinite().all() and (lam_of(step)["0"]["L"] - before["0"]["L"]).norm() > 1e-6


@pytest.mark.parametrize("step_norm", [None, "kl", "layer"])
@pytest.mark.parametrize("rule", RATES)
def test_a_step_at_a_zero_gradient_leaves_finite_equal_parameters(rule: str, step_norm: str | None) -> None:
    step, x, _ = learner("mlp", "gaussian", "kfac", rule, step_norm=step_norm, weight_decay=0.0)
    exact = copy.deepcopy(step.model)(x).detach()
    before = snapshot(step.model)
    for t in (0, 10, 11):
        step._t = t
        step(x, exact)
    assert_same(before, snapshot(step.model))
    assert all(t.isfinite().all() for lam in lam_of(step).values() for t in lam.values())


@pytest.mark.parametrize("family", ["kronecker", "scaled_kronecker", "diagonal", "dense", "eigen"])
def test_the_relative_rule_is_invariant_to_the_scale_of_the_loss(family: str) -> None:
    """Multiply loss, F and γ by c and Q by 1/c, with c = 1/σ² of a Gaussian: every update is the same."""
    results = []
    for c in (1.0, 1e6, 1e-6):
        model, x = CASES["mlp"].model(), CASES["mlp"].inputs()
        y = model(x).detach() + randn(5, 3, seed=3)
        step = ff.fishlegify(model, ff.likelihoods.Gaussian(c**-0.5), q={"*": family}, damping=0.05 * c, aux_lr=0.3)
        randomize_(step)
        for q in step.q.values():
            q.scale_(torch.tensor(1 / c, dtype=torch.float64))
        step._curvature.renew()
        values = []
        for _ in range(3):
            step._updates = 1
            values.append(step.update_aux(x, y))
        results.append((torch.stack(values), c * dense_q(step)))
    for value, q in results[1:]:
        assert_close(value, results[0][0], 1e-8, "A")
        assert_close(q, results[0][1], 1e-8, "c Q")


@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical", "antithetic"])
def test_the_model_is_bit_identical_after_an_update(fisher: str, rule: str) -> None:
    model = CASES["cnn"].model()
    model.insert(5, nn.Dropout(0.5))
    x = CASES["cnn"].inputs(8)
    y = targets_for(model, x, "gaussian")
    model(x).square().sum().backward()
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"], fisher=fisher, aux_rule=rule, aux_lr=RATES[rule])
    before, lam = snapshot(model), lam_of(step)
    for _ in range(3):
        step.update_aux(x, y)
    assert_same(before, snapshot(model))
    assert any((new[k] != lam[name][k]).any() for name, new in lam_of(step).items() for k in new)


@pytest.mark.parametrize("fisher", ["exact", "antithetic"])
@pytest.mark.parametrize("whole_step", [False, True])
def test_an_exception_in_the_forward_leaves_everything_as_it_was(fisher: str, whole_step: bool) -> None:
    """Raise at each of the forward passes of a call in turn; the call after it is as if there had been none."""
    trap = Trap()
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), trap, nn.Linear(4, 2)))
    x, y = randn(6, 3), randn(6, 2, seed=1)
    options: dict[str, Any] = {"fisher": fisher, "aux_batch_size": 5, "update_aux_every": 10}
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"], generator=generator(0), **options)
    call = step if whole_step else step.update_aux
    call(x, y)
    call(x, y)  # the first calls look the model over
    trap.calls = 0
    call(x, y)
    passes, before = trap.calls, snapshot(model, step)
    assert passes >= (3 if fisher == "antithetic" else 1)
    changed = []
    for at in range(1, passes + 1):
        trap.calls, trap.at = 0, at
        with pytest.raises(ArithmeticError):
            call(x, y)
        assert_same({k: before[k] for k in snapshot(model)}, snapshot(model), f"at pass {at}")
        try:
            assert_same(before, snapshot(model, step), f"at pass {at} of {passes}")
        except AssertionError as error:
            changed.append(str(error))
    assert not changed, changed


@pytest.mark.parametrize("rule", RATES)
def test_the_checks_notice_a_rule_that_does_nothing(rule: str) -> None:
    step, x, y = learner("mlp", "gaussian", "kronecker", rule)
    step._curvature.rule = lambda probe, q, ok: None
    with pytest.raises(AssertionError, match=r"update 1 of 0.L: relative error 1.00e\+00"):
        check_updates(step, x, y, "gaussian")
