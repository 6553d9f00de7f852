"""One whole step against the dense float64 oracle: steps that learn and plain ones, in every arrangement."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from cases import (
    CASES,
    LIKELIHOODS,
    SIGMA,
    Case,
    assert_close,
    assert_same,
    blocks_of,
    dense_q,
    drawn,
    filled,
    flat,
    from_packed,
    generator,
    lam_of,
    randn,
    randomize_,
    snapshot,
    targets_for,
)
from test_fisher import Tied, shared_layer
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.curvature import Curvature, Learned
from fishleg_func.descent import Descent
from fishleg_func.step import FishLegStep

REFRESH, LEARN, PLAIN = 0, 50, 51  # values of the step counter at update_aux_every=10
ARRANGEMENTS = [
    (None, "before"), ("kl", "before"), ("layer", "before"), (None, "after"), ("layer", "after"),
    (None, "nesterov"), ("kl", "nesterov"), ("layer", "nesterov"),
]  # fmt: skip
NAMES = list(LIKELIHOODS)


def stepper(
    case: str, likelihood: str, batch: int = 5, seed: int = 0, **options: object
) -> tuple[FishLegStep, Tensor, Tensor]:
    """Return a step with random λ and bases, and a batch."""
    model, x = CASES[case].model(), CASES[case].inputs(batch, seed)
    y = targets_for(model, x, likelihood, seed)
    settings = {"lr": 0.05, "damping": 0.05, "weight_decay": 0.1, "aux_lr": 0.3, "generator": generator(0)}
    settings |= {"update_aux_every": 10} | options
    step = ff.fishlegify(model, LIKELIHOODS[likelihood], **settings)  # type: ignore[arg-type]
    randomize_(step)
    return step, x, y


def check_steps(
    step: FishLegStep, x: Tensor, y: Tensor, likelihood: str, kinds: tuple[int, ...] = (LEARN, PLAIN, LEARN, PLAIN),
    curvature: Callable[[nn.Module], Tensor] | None = None, probe: Callable[[FishLegStep], Tensor] | None = None,
    last: str | None = None,
) -> None:  # fmt: skip
    """Take consecutive steps; compare each with the oracle at the same point: loss, m, p, the updates of λ and θ."""
    model, options, hyper, before_q = step.model, step._options, step.hyper, step._options.momentum != "after"
    moments: dict[str, reference.Moments] = {}
    for number, kind in enumerate(kinds):
        step._t, learn = kind, kind != PLAIN
        twin, lam, theta = copy.deepcopy(model), lam_of(step), reference.flat_parameters(model)
        m = from_packed(model, step._averages.momentum() if before_q else step._direction)
        draw = drawn if options.u == "gaussian" else probe
        given = {
            "curvature": curvature(twin) if curvature and learn else None,
            "probe": draw(step) if draw and learn else None,
        }
        loss = step(x, y)
        out = reference.training_step(
            twin, x, y, likelihood, blocks_of(step, lam), momentum=m, lr=hyper.lr.item(), beta=hyper.beta.item(),
            weight_decay=hyper.weight_decay.item(), damping=hyper.damping.item(), step_norm=options.step_norm,
            momentum_rule=options.momentum, learn=learn, aux_rule=options.aux_rule, aux_lr=hyper.aux_lr.item(),
            precondition_aux=options.precondition_aux, sigma=SIGMA, kl_clip=hyper.kl_clip.item(),
            aux_step=1 + sum(k != PLAIN for k in kinds[:number]), moments=moments,
            scale_free=options.step_norm == "layer" and options.u != "gaussian" and not options.precondition_aux,
            warmup_rank=options.warmup_rank * (kind < 10), last=last, **given,
        )  # fmt: skip
        where = f"step {number}, counter {kind}"
        moments = out.moments or moments
        assert_close(loss, out.loss, 1e-10, f"{where}: loss")
        assert_close(reference.flat_parameters(model) - theta, out.theta - theta, 1e-8, f"{where}: update of θ")
        assert_close(from_packed(model, step._direction), out.direction, 1e-8, f"{where}: p")
        if before_q:
            assert_close(from_packed(model, step._averages.momentum()), out.momentum, 1e-8, f"{where}: m")
        now, moved = lam_of(step), False
        for name, k in [(block, key) for block, of in now.items() for key in of]:
            change, expected = now[name][k] - lam[name][k], out.blocks[name].lam[k] - lam[name][k]
            if expected.any():
                moved = True
                assert_close(change, expected, 1e-8, f"{where}: update of {name}.{k}")
            else:  # in plain steps; without a scale, a block may have nothing to learn, too
                assert not change.any()
        assert moved == learn


@pytest.mark.parametrize(("step_norm", "momentum"), ARRANGEMENTS)
@pytest.mark.parametrize("family", ["kfac", "kronecker", "dense", "eigen", "scaled_kronecker", "diagonal"])
def test_steps_for_each_family(family: str, step_norm: str | None, momentum: str) -> None:
    step, x, y = stepper("mlp", "categorical", q=family, step_norm=step_norm, momentum=momentum)
    check_steps(step, x, y, "categorical")


GRID = [
    (case, NAMES[i % 4], ("kfac", "kronecker", "eigen")[i % 3], *ARRANGEMENTS[j])
    for i, (case, j) in enumerate(itertools.product(CASES, range(len(ARRANGEMENTS))))
]


@pytest.mark.parametrize(("case", "likelihood", "family", "step_norm", "momentum"), GRID)
def test_steps_for_each_model(case: str, likelihood: str, family: str, step_norm: str | None, momentum: str) -> None:
    u = "gaussian" if momentum == "before" else "gradient"
    step, x, y = stepper(case, likelihood, q=family, step_norm=step_norm, momentum=momentum, u=u)
    check_steps(step, x, y, likelihood, (LEARN, PLAIN))


class Reused(nn.Module):
    """A layer whose weight is also used outside of it, and a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x).tanh() @ self.layer.weight) * self.gain.sum((0, 1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular"), nn.Unflatten(1, (1, 2, 2)),
        nn.Conv3d(1, 3, (2, 1, 2), stride=(1, 1, 2)), nn.Flatten(), nn.Linear(12, 2),
    )  # fmt: skip


ODD = {
    "tied": Case(Tied, (3,), vocabulary=4),
    "shared": Case(shared_layer, (3,)),
    "reused": Case(Reused, (3,)),
    "convolutions": Case(convolutions, (2, 4)),
}


@pytest.mark.parametrize("family", ["kfac", "kronecker"])
@pytest.mark.parametrize("name", ODD)
def test_steps_for_odd_models(name: str, family: str) -> None:
    model, x = ODD[name].model(), ODD[name].inputs()
    y = targets_for(model, x, "gaussian")
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"], q=family, damping=0.05, step_norm=None, update_aux_every=10)
    randomize_(step)
    check_steps(step, x, y, "gaussian")


class Idle(nn.Sequential):
    """Its last layer is never called."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


@pytest.mark.parametrize("u", ["gradient", "gaussian"])
def test_a_layer_that_is_never_called_stays(u: str) -> None:
    model, x, y = filled(Idle(nn.Linear(3, 2), nn.Linear(3, 2))), randn(5, 3), randn(5, 2, seed=1)
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"], damping=0.05, weight_decay=0.0, u=u)
    before, start = lam_of(step)["1"], copy.deepcopy(model)
    for kind in (REFRESH, LEARN, PLAIN):
        step._t = kind
        step(x, y)
    assert_same(start[1].state_dict(), model[1].state_dict())
    change = max((new - before[k]).norm().item() for k, new in lam_of(step)["1"].items())
    assert change <= 1e-12 * (u == "gaussian")  # Q is 1/γ already, as F is zero
    assert (start[0].weight - model[0].weight).norm() > 1e-3


@pytest.mark.parametrize("family", ["kfac", "eigen", "diagonal"])
@pytest.mark.parametrize("case", ["mlp", "cnn", "twice", "embedding"])
def test_first_steps_that_refresh_the_bases(case: str, family: str) -> None:
    """Start from zero momentum; λ is learned, and Q applied, at the basis that the step has just made."""
    step, x, y = stepper(case, "bernoulli", q=family)
    basis = blocks_of(step)
    check_steps(step, x, y, "bernoulli", (REFRESH, REFRESH + 1, LEARN, PLAIN))
    assert any((b.basis[k] != basis[n].basis[k]).any() for n, b in blocks_of(step).items() for k in b.basis)  # type: ignore[union-attr,index]


@pytest.mark.parametrize("kl_clip", [1e-6, 1e3])
@pytest.mark.parametrize("momentum", ["before", "nesterov"])
def test_the_kl_norm_bounds_the_predicted_divergence(momentum: str, kl_clip: float) -> None:
    settings = {"q": "kronecker", "step_norm": "kl", "weight_decay": 0.0, "momentum": momentum}
    step, x, y = stepper("mlp", "gaussian", **settings)  # type: ignore[arg-type]
    step.hyper.kl_clip.fill_(kl_clip)
    theta = reference.flat_parameters(step.model)
    check_steps(step, x, y, "gaussian", (PLAIN,))
    moved = theta - reference.flat_parameters(step.model)
    if kl_clip < 1:
        predicted = moved @ torch.linalg.solve(dense_q(step), moved)  # lr² mᵀQm = (lr p)ᵀ Q⁻¹ (lr p)
        assert predicted.item() == pytest.approx(kl_clip, rel=1e-8)
    elif momentum == "before":
        assert_close(moved, step.hyper.lr * from_packed(step.model, step._direction), 1e-8)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("case", ["mlp", "cnn", "twice"])
def test_steps_with_adam_on_lambda(case: str, preconditioned: bool) -> None:
    step, x, y = stepper(case, "poisson", aux_rule="adam", aux_lr=0.01, precondition_aux=preconditioned)
    check_steps(step, x, y, "poisson", (LEARN, PLAIN, LEARN, LEARN))


def test_steps_with_the_preconditioned_loss() -> None:
    step, x, y = stepper("twice", "poisson", precondition_aux=True)
    check_steps(step, x, y, "poisson")


def test_steps_that_probe_with_the_momentum() -> None:
    step, x, y = stepper("mlp", "gaussian", u="momentum")

    def momentum(step: FishLegStep) -> Tensor:
        twin = copy.deepcopy(step.model)
        g = torch.autograd.grad(LIKELIHOODS["gaussian"].nll(twin(x), y), list(twin.parameters()))
        return 0.9 * from_packed(twin, step._averages.momentum()) + 0.1 * torch.cat([t.reshape(-1) for t in g])

    step._t = PLAIN
    step(CASES["mlp"].inputs(seed=8), y)  # so that the momentum is not along the gradient
    check_steps(step, x, y, "gaussian", probe=momentum)


def test_steps_that_probe_at_random() -> None:
    step, x, y = stepper("cnn", "gaussian", u="gaussian")
    first = drawn(step)
    check_steps(step, x, y, "gaussian")
    assert not torch.equal(first, drawn(step))  # each step has draws of its own


@pytest.mark.parametrize(("case", "likelihood"), [("mlp", "categorical"), ("cnn", "poisson"), ("sequence", "gaussian")])
def test_steps_with_the_empirical_fisher(case: str, likelihood: str) -> None:
    step, x, y = stepper(case, likelihood, fisher="empirical")
    check_steps(step, x, y, likelihood, curvature=lambda m: reference.score_fisher(m, x, y, likelihood, sigma=SIGMA))


@pytest.mark.parametrize(("case", "likelihood"), [("mlp", "categorical"), ("cnn", "bernoulli")])
def test_steps_with_curvature_from_a_part_of_the_batch(case: str, likelihood: str) -> None:
    step, x, y = stepper(case, likelihood, batch=7, aux_batch_size=3)
    y[2] = 0 if likelihood == "categorical" else y[2]  # a target that is not masked

    def part(model: nn.Module) -> Tensor:
        return reference.fisher(model, x[:3], likelihood, sigma=SIGMA, targets=y[:3])

    check_steps(step, x, y, likelihood, curvature=part)


def test_steps_that_never_learn() -> None:
    step, x, y = stepper("mlp", "gaussian", update_aux_every=0)
    check_steps(step, x, y, "gaussian", (PLAIN, PLAIN, PLAIN))


def test_steps_with_few_and_with_many_rows() -> None:
    for batch in (1, 40):
        step, x, y = stepper("mlp", "gaussian", batch=batch)
        g = step._runner.run(x, y, twice=False).gradient()[1]
        assert {type(u) for u in g.values()} == {ff.LowRank if batch == 1 else Tensor}
        check_steps(step, x, y, "gaussian")


def test_changed_hyperparameters_take_effect_at_the_next_step() -> None:
    step, x, y = stepper("mlp", "gaussian")
    for factor in (0.5, 3.0):
        for value in vars(step.hyper).values():
            value.mul_(factor if value is not step.hyper.beta else 0.7)
        check_steps(step, x, y, "gaussian", (LEARN, PLAIN))


def test_frozen_parameters_stay_and_the_others_move_as_if_alone() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    model[1].weight.requires_grad_(False)
    x, y, kept = randn(5, 3), randn(5, 2, seed=1), model[1].weight.detach().clone()
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"], damping=0.05, update_aux_every=10)
    randomize_(step)
    check_steps(step, x, y, "gaussian")
    assert torch.equal(model[1].weight, kept)


def test_buffers_after_a_step_are_those_of_one_plain_forward_pass() -> None:
    step, x, y = stepper("cnn", "gaussian", aux_batch_size=2)
    for kind in (REFRESH, LEARN, PLAIN):
        twin, step._t = copy.deepcopy(step.model), kind
        step(x, y)
        twin(x)
        for (name, actual), expected in zip(step.model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert int(step.model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("case", ["mlp", "cnn", "twice", "embedding"])
def test_natural_gradient_is_dense_q_times_the_gradient_and_changes_nothing(case: str) -> None:
    step, x, y = stepper(case, "gaussian")
    step._t = LEARN
    step(x, y)
    before, twin = snapshot(step.model, step), copy.deepcopy(step.model)
    actual = step.natural_gradient(x, y)
    assert_same(before, snapshot(step.model, step))
    g = torch.autograd.grad(LIKELIHOODS["gaussian"].nll(twin(x), y), list(twin.parameters()))
    expected = dense_q(step) @ torch.cat([t.reshape(-1) for t in g])
    assert {k: t.shape for k, t in actual.items()} == {k: t.shape for k, t in step.model.named_parameters()}
    assert_close(flat(step.model, actual), expected, 1e-10)


@pytest.mark.parametrize("family", ["kfac", "dense", "eigen"])
def test_the_momentum_pair(family: str) -> None:
    """Hold p = Q m: recomputed where Q changes, kept up on the plain steps, and recomputed by update_aux."""
    step, x, y = stepper("twice", "gaussian", q=family)
    for kind in (LEARN, PLAIN, PLAIN, REFRESH, PLAIN):
        step._t = kind
        step(x, y)
        for name, m in step._averages.momentum().items():
            if kind == PLAIN:
                assert_close(step._direction[name], step._curvature.apply(name, m), 1e-12, name)
            else:
                assert torch.equal(step._direction[name], step._curvature.apply(name, m)), name
    step.update_aux(x, y)
    momentum = step._averages.momentum()
    assert all(torch.equal(step._direction[k], step._curvature.apply(k, m)) for k, m in momentum.items())
    assert_close(from_packed(step.model, step._direction), dense_q(step) @ from_packed(step.model, momentum), 1e-10)


@pytest.mark.parametrize("case", ["mlp", "cnn", "embedding"])
def test_accuracy_is_the_dense_residual_on_the_same_probes(case: str) -> None:
    step, x, y = stepper(case, "gaussian")
    step._t = LEARN
    step(x, y)
    model, n, layout = step.model, 3, reference.block_indices(step.model)
    F, q = reference.fisher(model, x, "gaussian", sigma=SIGMA), dense_q(step)
    salts = iter(range(n * len(step.q)))
    probes = [{k: step._meter.fork(3).normal(p, next(salts)) for k, p in step._direction.items()} for _ in range(n)]
    us = [from_packed(model, p) for p in probes]
    residuals = [(F + 0.05 * torch.eye(len(F))) @ q @ u - u for u in us]
    before = snapshot(model)
    found = step.accuracy(x, n=n)
    assert_same(before, snapshot(model))
    overall = sum((r.norm() / u.norm()).item() for r, u in zip(residuals, us, strict=True)) / n
    assert found.overall == pytest.approx(overall, rel=1e-8)
    assert found.layers.keys() == layout.keys()
    for name, (where, _) in layout.items():
        pairs = zip(residuals, us, strict=True)
        mean = sum((r[where].norm() / u[where].norm()).item() for r, u in pairs) / n
        assert found.layers[name] == pytest.approx(mean, rel=1e-8)


def test_accuracy_is_zero_at_the_exact_inverse_and_known_at_the_identity() -> None:
    model, x = filled(nn.Linear(3, 2)), randn(9, 3)
    F = reference.fisher(model, x, "bernoulli")
    step = ff.fishlegify(model, LIKELIHOODS["bernoulli"], q="dense", damping=0.1)
    # at Q = I: the residual is (F - 0.9 I) u, and E |Mu|² = |M|_F²
    expected = (F - 0.9 * torch.eye(8)).norm() / 8**0.5
    assert step.accuracy(x, n=400).overall == pytest.approx(expected.item(), rel=0.05)
    where = reference.block_indices(model)["(root)"][0]
    inverse = reference.damped_inverse(F, 0.1)[where[:, None], where]
    step.q["(root)"].L.copy_(torch.linalg.cholesky(inverse))
    step._curvature.renew()
    found = step.accuracy(x, n=20)
    assert found.overall < 1e-12 and set(found.layers) == {"(root)"} and found.layers["(root)"] < 1e-12


def test_the_order_of_the_examples_does_not_matter() -> None:
    updates = []
    for order in (torch.arange(5), torch.tensor([3, 0, 4, 1, 2])):
        step, x, y = stepper("cnn", "gaussian")
        step._t, theta = LEARN, reference.flat_parameters(step.model)
        step(x[order], y[order])
        updates.append(reference.flat_parameters(step.model) - theta)
    assert_close(updates[1], updates[0], 1e-8)


IDENTITIES: dict[str, Callable[..., object]] = {
    "_move": lambda *_: None,  # θ stays
    "move": lambda self, prepared: Learned(torch.zeros(()), dict.fromkeys(self.q, lambda p: p), None),  # λ stays
    "apply": lambda _self, _name, u: u,  # Q = I
    "_scales": lambda _self, direction, _g: torch.ones_like(direction.norms),  # s(p) = p
}


@pytest.mark.parametrize("method", IDENTITIES)
def test_the_checks_notice_a_part_that_is_the_identity(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, x, y = stepper("mlp", "gaussian")
    monkeypatch.setattr(Descent if method.startswith("_") else Curvature, method, IDENTITIES[method])
    with pytest.raises(AssertionError, match="relative error"):
        check_steps(step, x, y, "gaussian", (LEARN,))
    if method == "apply":
        for check in (
            test_natural_gradient_is_dense_q_times_the_gradient_and_changes_nothing,
            test_accuracy_is_the_dense_residual_on_the_same_probes,
        ):
            with pytest.raises(AssertionError):
                check("mlp")
