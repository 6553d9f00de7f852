"""Pruning: saliency and compensation against dense algebra; structures, schedules, masks, the example."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_close, filled, generator, randn, snapshot
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import fishleg_func as ff
from fishleg_func import pruning

GAMMA = 0.05
CATEGORICAL = ff.likelihoods.Categorical()
TOL = 1e-12


def mlp() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


def batches(sizes: tuple[int, ...] = (20, 20)) -> list[tuple[Tensor, Tensor]]:
    n = sum(sizes)
    x, y = randn(n, 4), torch.randint(3, (n,), generator=generator(1))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def learned(model: nn.Module, q: Any = "kfac") -> ff.InverseFisher:
    return ff.estimate_inverse_fisher(
        model, CATEGORICAL, batches(), damping=GAMMA, updates=40, q=q, generator=generator(0)
    )


def computed(model: nn.Module) -> pruning.BlockInverse:
    return pruning.block_inverse(model, CATEGORICAL, batches(), damping=GAMMA)


INVERSES: dict[str, Callable[[nn.Module], Any]] = {
    "kfac": learned,
    "eigen": lambda model: learned(model, "eigen"),
    "joint": lambda model: learned(model, "joint"),
    "blocks": computed,
    "diagonal": lambda model: pruning.block_inverse(model, CATEGORICAL, batches(), damping=GAMMA, size=1),
    "magnitude": pruning.magnitude,
}
each_inverse = pytest.mark.parametrize("kind", INVERSES)


def some_masks(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    return {
        name: torch.rand(p.shape, generator=generator(seed + i)) > 0.6
        for i, (name, p) in enumerate(model.named_parameters())
        if p.ndim > 1
    }


def removed_by(model: nn.Module, masks: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [
            ~masks[name].flatten() if name in masks else torch.zeros(p.numel(), dtype=torch.bool)
            for name, p in model.named_parameters()
        ]
    )


# --- compensation and saliency, against dense algebra ---


@each_inverse
def test_compensation_is_the_constrained_minimizer(kind: str) -> None:
    """Of ½ δᵀQ⁻¹δ with δ = -w where a weight goes: the KKT system, solved densely."""
    model = mlp()
    inverse, masks, w = INVERSES[kind](model), some_masks(model), flat(model)
    gone, hessian = removed_by(model, masks), torch.linalg.inv(inverse.dense())
    delta = inverse.flatten(pruning.compensation(model, inverse, masks, tol=TOL))
    assert torch.equal(delta[gone], -w[gone]) and gone.sum() > 10
    expected = torch.linalg.solve(hessian[~gone][:, ~gone], hessian[~gone][:, gone] @ w[gone])
    assert float((delta[~gone] - expected).norm()) <= 1e-8 * float(w.norm())
    assert (kind in {"diagonal", "magnitude"}) == bool((delta[~gone].abs() < 1e-12).all())


def test_in_a_linear_gaussian_model_the_rest_is_the_best_fit_of_what_is_left() -> None:
    """Least squares on the inputs that stay, the loss of which rises by the increase that was predicted."""
    x = randn(50, 5) @ randn(5, 5, seed=1)
    y = x @ randn(5, 1, seed=2) + 0.1 * randn(50, 1, seed=3)
    model = nn.Linear(5, 1, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, y).solution.mT.clone()
    likelihood, before = ff.likelihoods.Gaussian(), float(((model(x) - y) ** 2).mean().detach() / 2)
    inverse = pruning.block_inverse(model, likelihood, [(x, y)], damping=1e-12)
    done = pruning.prune(model, inverse, 0.4, tol=TOL)
    kept = done.masks["weight"][0]
    assert kept.sum() == 3
    best = torch.linalg.lstsq(x[:, kept], y).solution[:, 0]
    assert_close(model.weight.detach()[0, kept], best, 1e-8)
    assert abs(float(((model(x) - y) ** 2).mean().detach() / 2) - before - done.increase) < 1e-9 < done.increase


@each_inverse
def test_saliency_is_the_cost_of_removing_one_weight(kind: str) -> None:
    model = mlp()
    inverse, w = INVERSES[kind](model), flat(model)
    hessian, cost = torch.linalg.inv(inverse.dense()), inverse.flatten(pruning.saliency(model, inverse))
    for i in (0, 11, len(w) - 1):
        gone = torch.arange(len(w)) == i
        rest = torch.linalg.solve(hessian[~gone][:, ~gone], hessian[~gone][:, gone] @ w[gone])
        delta = torch.zeros_like(w).masked_scatter(~gone, rest) - gone * w
        assert_close(cost[i], delta @ hessian @ delta / 2, 1e-8)


def test_one_at_a_time_is_the_optimal_brain_surgeon() -> None:
    """With one weight in a round, columns of Q are all that is needed: δ = -w_i Q e_i / Q_ii at the first."""
    model = mlp()
    inverse, w = computed(model), flat(model)
    cost = torch.where(removed_by(model, {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in
                                          model.named_parameters() if p.ndim > 1}),
                       inverse.flatten(pruning.saliency(model, inverse)), torch.inf)  # fmt: skip
    i, q = int(cost.argmin()), inverse.dense()
    done = pruning.prune(model, inverse, 1 / 42, tol=TOL)
    expected = w - w[i] * q[:, i] / q[i, i]
    expected[i] = 0
    assert_close(flat(model), expected, 1e-9)
    assert abs(done.increase - float(cost[i])) < 1e-12 and done.sparsity == pytest.approx(1 / 42)


def test_a_compensation_that_is_not_solved_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(pruning, "_MAX_ITERATIONS", 1)
    with pytest.warns(RuntimeWarning, match="must have one <= 1e-12"):
        pruning.compensation(model, computed(model), some_masks(model), tol=TOL)


def test_a_compensation_that_is_not_finite_changes_nothing() -> None:
    model = mlp()
    inverse = computed(model)
    model[0].weight.data[0, 0] = torch.nan
    before = flat(model)
    with pytest.raises(FloatingPointError, match=r"residual of nan.*nothing was changed\. Look for parameters"):
        pruning.prune(model, inverse, 0.9)
    assert torch.equal(flat(model).nan_to_num(), before.nan_to_num())


# --- which weights go ---


def test_magnitude_prunes_as_torch_does() -> None:
    model = mlp()
    done = pruning.prune(model, pruning.magnitude(model), 0.5)
    other = mlp()
    torch_prune.global_unstructured(
        [(other[0], "weight"), (other[2], "weight")], torch_prune.L1Unstructured, amount=0.5
    )
    assert all(torch.equal(model[i].weight, other[i].weight) for i in (0, 2))
    assert torch.equal(done.masks["0.weight"].double(), other[0].weight_mask)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_fraction_is_reached_and_biases_stay(rounds: int, scope: str) -> None:
    model = mlp()
    done = pruning.prune(model, learned(model), 0.5, rounds=rounds, scope=scope)
    zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters()}
    assert zeros == {name: int((~done.masks[name]).sum()) if name in done.masks else 0 for name in zeros}
    assert zeros["0.weight"] + zeros["2.weight"] == 21 and done.sparsity == 0.5
    assert scope == "global" or (zeros["0.weight"], zeros["2.weight"]) == (12, 9)


def test_layers_are_compared_or_not() -> None:
    counts = []
    for scope in ("global", "layer"):
        model = mlp()
        model[0].weight.data *= 100
        pruning.prune(model, pruning.magnitude(model), 0.3, scope=scope)
        counts.append([int((model[i].weight == 0).sum()) for i in (0, 2)])
    assert counts == [[0, 13], [7, 5]]


def test_more_rounds_choose_from_weights_that_have_made_up() -> None:
    once, often = mlp(), mlp()
    inverse = computed(once)
    first = pruning.prune(once, inverse, 0.7, tol=TOL)
    later = pruning.prune(often, inverse, 0.7, rounds=20, tol=TOL)
    assert later.increase < first.increase


def test_groups_go_together() -> None:
    model = mlp()
    done = pruning.prune(model, pruning.magnitude(model), 0.5, structure="channel", include="0")
    rows = mlp()[0].weight.square().sum(1).argsort()[:3]
    assert done.masks.keys() == {"0.weight"}
    assert set((~done.masks["0.weight"]).all(1).nonzero().flatten().tolist()) == set(rows.tolist())
    assert int((~done.masks["0.weight"]).sum()) == 12

    model = mlp()
    done = pruning.prune(model, learned(model), 0.5, structure=2, exclude="0")
    pairs = done.masks["2.weight"].view(-1, 2)
    assert done.masks.keys() == {"2.weight"} and torch.equal(pairs[:, 0], pairs[:, 1])
    assert 4 <= int((~pairs[:, 0]).sum()) <= 5
    assert not torch.equal(model[2].bias, mlp()[2].bias) and torch.equal(model[0].weight, mlp()[0].weight)


def test_groups_of_unequal_size_are_compared_per_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(8, 2, bias=False))
    for p, (low, high) in zip(model.parameters(), ((1.0, 1.2), (0.9, 2.0)), strict=True):
        p.data[0], p.data[1] = low, high
    done = pruning.prune(model, pruning.magnitude(model), 0.5, structure="channel")
    gone = {name: (~mask).all(1).tolist() for name, mask in done.masks.items()}
    assert gone == {"0.weight": [True, False], "1.weight": [True, False]}


def test_what_is_removed_stays_so() -> None:
    model = mlp()
    inverse = learned(model)
    first = pruning.prune(model, inverse, 0.3, include="0")
    second = pruning.prune(model, inverse, 0.5, masks=first.masks, include="2")
    assert torch.equal(second.masks["0.weight"], first.masks["0.weight"])
    assert int((model[0].weight == 0).sum()) == int((~first.masks["0.weight"]).sum()) == 7
    with pytest.raises(ValueError, match=r"sparsity=0.2 must be >= 0.5, which masks have removed"):
        pruning.prune(model, inverse, 0.2, masks=second.masks, include="2")


def test_masks_of_weights_that_are_not_zero_yet_count() -> None:
    model = mlp()
    masks = {"2.weight": mlp()[2].weight.detach().abs() < mlp()[2].weight.detach().abs().max()}  # the largest goes
    done = pruning.prune(model, pruning.magnitude(model), 0.5, masks=masks)
    assert not (done.masks["2.weight"] & ~masks["2.weight"]).any() and done.sparsity == 0.5


def test_the_least_salient_go() -> None:
    """The larger weight, where its input is so small that it does not count."""
    model, x = nn.Linear(2, 1, bias=False).double(), randn(50, 2) * torch.tensor([0.01, 1.0])
    model.weight.data = torch.tensor([[2.0, 1.0]]).double()
    inverse = pruning.block_inverse(model, ff.likelihoods.Gaussian(), [(x, None)], damping=1e-6)
    done = pruning.prune(model, inverse, 0.5)
    assert done.masks["weight"].tolist() == [[False, True]]


def test_schedules() -> None:
    assert pruning.cubic_schedule(0.5, 0.9, 1) == [0.9]
    steps = pruning.cubic_schedule(0.2, 0.9, 7)
    assert len(steps) == 7 and steps == sorted(steps) and steps[-1] == 0.9 and steps[0] > 0.2
    assert steps[1] == pytest.approx(0.9 - 0.7 * (5 / 7) ** 3)
    with pytest.raises(ValueError, match=r"start=0.95 must be in \[0, 0.9\]"):
        pruning.cubic_schedule(0.95, 0.9, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0 must be"),
        ({"rounds": 0}, "rounds=0 must be"),
        ({"scope": "row"}, "scope="),
        ({"structure": 4}, "structure=4 must divide the 6 inputs of '2.weight'"),
        ({"structure": "row"}, "structure='row' must be"),
        ({"structure": 0}, "structure=0 must be"),
        ({"include": "5"}, "include"),
        ({"exclude": "*"}, "must leave a parameter"),
        ({"masks": {"0.weight": torch.ones(2)}}, r"masks of .*0.weight"),
        ({"masks": {"nought": torch.ones(2)}}, r"masks of .*nought"),
        ({"tol": 0.0}, "tol=0.0 must be"),
    ],
)
def test_arguments_out_of_range_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = mlp()
    inverse, before = learned(model), snapshot(model)
    given = {"sparsity": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        pruning.prune(model, inverse, given.pop("sparsity"), **given)
    assert all(torch.equal(a, b) for a, b in zip(flat(model), flat(mlp()), strict=True)) and before


def test_an_inverse_of_another_model_is_refused() -> None:
    inverse = learned(mlp())
    with pytest.raises(ValueError, match=r"an inverse about .* must be about parameters of the model"):
        pruning.saliency(nn.Linear(2, 2), inverse)


# --- masks through further training ---


@pytest.mark.parametrize("how", ["adamw", "fishleg"])
def test_masks_hold_through_training(how: str) -> None:
    model = mlp()
    done = pruning.prune(model, learned(model), 0.5)
    before, parameters = flat(model), {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruning.attach(model, done.masks)
    if how == "adamw":
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    else:
        with ff.fishlegify(model, CATEGORICAL) as step:
            for x, y in batches():
                step(x, y)
    pruning.detach(model, done.masks)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    zeros = {name: model.get_parameter(name) == 0 for name in done.masks}
    assert all(torch.equal(zeros[name], ~mask) for name, mask in done.masks.items())
    after = torch.cat([model.get_parameter(name).detach().flatten() for name in mlp().state_dict()])
    assert ((after != before).sum()) == 51 - 21


def test_masks_of_no_parameter_are_refused_and_none_is_attached() -> None:
    model = mlp()
    masks = some_masks(model) | {"nought": torch.ones(2)}
    with pytest.raises(ValueError, match="nought"):
        pruning.attach(model, masks)
    assert not torch_prune.is_pruned(model)


def test_gradual_pruning_refines_one_inverse() -> None:
    model, updates, zeros = mlp(), [], []

    def refine(before: Any) -> ff.InverseFisher:
        assert not torch_prune.is_pruned(model)
        done, state = (before.fit.updates, before.fit.state) if before else (0, None)
        inverse = ff.estimate_inverse_fisher(
            model, CATEGORICAL, batches(), damping=GAMMA, updates=done + 5, state=state
        )
        updates.append(inverse.fit.updates)
        return inverse

    def train(sparsity: float) -> None:
        with ff.fishlegify(model, CATEGORICAL) as step:
            for x, y in batches():
                step(x, y)
        zeros.append((sparsity, sum(int((model[i].weight == 0).sum()) for i in (0, 2))))

    done = pruning.prune_gradually(model, pruning.cubic_schedule(0.0, 0.8, 3), refine, train, rounds=2)
    assert updates == [5, 10, 15]
    assert zeros == [(s, round(42 * s)) for s in pruning.cubic_schedule(0.0, 0.8, 3)]
    assert done.sparsity == pytest.approx(zeros[-1][1] / 42) and not torch_prune.is_pruned(model)


def test_masks_are_taken_off_if_training_fails() -> None:
    model = mlp()

    def fail(sparsity: float) -> None:
        assert torch_prune.is_pruned(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruning.prune_gradually(model, [0.5], lambda _: pruning.magnitude(model), fail)
    assert not torch_prune.is_pruned(model)
    with pytest.raises(ValueError, match="must hold at least one"):
        pruning.prune_gradually(model, [], lambda _: pruning.magnitude(model), fail)


# --- the example ---


def test_example_of_pruning(tmp_path: Path) -> None:
    example = importlib.import_module("pruning")
    options = "--epochs 6 --updates 60 --rounds 4 --size 65 --examples 100 --steps 2 --sparsities 0.8 0.9"
    curves = example.main([*options.split(), "--picture", str(tmp_path / "picture.png")])
    at = {name: found[-1] for name, (_, found) in curves.items()}
    assert at.keys() == {"magnitude", "diagonal Fisher", "OBS, blocks of 65", "FishLeg", "FishLeg, gradual"}
    assert at["FishLeg"] > at["magnitude"] + 10 and at["FishLeg"] > at["diagonal Fisher"] + 10
    assert at["FishLeg, gradual"] > 85
    assert (tmp_path / "picture.png").stat().st_size > 5000
