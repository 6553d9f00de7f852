"""The optimizer front end: the same algorithm as the step function, and torch's contract for optimizers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import generator, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.encoder(self.embedding(tokens))))
        return logits


def labels(*shape: int, seed: int = 0, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=generator(seed))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, lambda i: (randn(12, 4, seed=i), labels(12, seed=i))),
    "cnn": (cnn, lambda i: (randn(8, 1, 6, 6, seed=i), labels(8, seed=i))),
    "transformer": (Transformer, lambda i: (labels(6, 5, seed=i, classes=7), labels(6, 5, seed=i + 50, classes=7))),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def optimizer_of(model: nn.Module, likelihood: Any = None, **options: Any) -> ff.FishLeg:
    return ff.FishLeg(model, likelihood or Categorical(), generator=generator(3), **options)


def train(optimizer: Any, model: nn.Module, name: str, steps: range, **scale: float) -> list[float]:
    losses = []
    for i in steps:
        torch.manual_seed(i)
        x, y = MODELS[name][1](i)
        optimizer.zero_grad()
        loss = Categorical().nll(model(x), y)
        (scale.get("scale", 1.0) * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k]))] == []


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"u": "momentum", "momentum": "before", "step_norm": "kl"},
    "gaussian": {"u": "gaussian", "step_norm": None, "lr": 1e-2, "damping": 0.1},
    "after": {"momentum": "after", "update_aux_every": 3},
    "part": {"aux_batch_size": 4, "weight_decay": 0.1},
    "adam": {"aux_rule": "adam", "aux_lr": 1e-3, "q": "kronecker"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_it_takes_the_steps_of_the_step_function(name: str, options: str) -> None:
    mine, other = built(name), built(name)
    if options == "part":  # is run apart from the whole batch, with dropout of its own
        for m in (*mine.modules(), *other.modules()):
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    optimizer = optimizer_of(mine, **OPTIONS[options])
    losses = train(optimizer, mine, name, range(20))
    step = ff.fishlegify(other, Categorical(), generator=generator(3), **OPTIONS[options])
    for i, loss in enumerate(losses):
        torch.manual_seed(i)
        assert abs(step(*MODELS[name][1](i)).item() - loss) <= 1e-6
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6
    for (k, a), b in zip(mine.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a, b), k
    assert (parameters(mine) - parameters(built(name))).abs().max() > 1e-2


def test_long_layers_are_probed_by_rows_as_in_the_step_function() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(130, 140), nn.Tanh(), nn.Linear(140, 3)).double()

    x, y = randn(40, 130), labels(40)
    mine, other = build(), build()
    optimizer = optimizer_of(mine)
    step = ff.fishlegify(other, Categorical(), generator=generator(3))
    for _ in range(12):
        optimizer.zero_grad()
        Categorical().nll(mine(x), y).backward()
        optimizer.step()
        step(x, y)
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6


def test_gradients_are_the_truth_and_are_only_read() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    train(optimizer, model, "mlp", range(2))
    x, y = MODELS["mlp"][1](3)
    optimizer.zero_grad()
    Categorical().nll(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    fresh = built("mlp")
    optimizer, before = optimizer_of(fresh), parameters(fresh)
    Categorical().nll(fresh(x), y).backward()
    for p in fresh.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(before, parameters(fresh))  # what the batch's own gradient is does not matter


@pytest.mark.parametrize("options", [{}, {"update_aux_every": 2}, {"u": "gaussian"}])
def test_four_micro_batches_are_one_large_batch(options: dict[str, Any]) -> None:
    whole, parts = built("mlp"), built("mlp")
    one, four = optimizer_of(whole, **options), optimizer_of(parts, **options)
    train(one, whole, "mlp", range(12))
    for i in range(12):
        x, y = MODELS["mlp"][1](i)
        four.zero_grad()
        for j in range(4):
            (Categorical().nll(parts(x[3 * j : 3 * j + 3]), y[3 * j : 3 * j + 3]) / 4).backward()
        four.step()
    assert (parameters(whole) - parameters(parts)).abs().max() <= 1e-6


def test_masked_tokens_are_seen_from_the_loss() -> None:
    mine, other = built("transformer"), built("transformer")
    optimizer, step = optimizer_of(mine), ff.fishlegify(other, Categorical(), generator=generator(3))
    for i in range(12):
        x, y = MODELS["transformer"][1](i)
        y[:, 3:] = -100
        optimizer.zero_grad()
        Categorical().nll(mine(x), y).backward()
        optimizer.step()
        step(x, y)
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-6


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    mine, other = built("mlp"), built("mlp")
    optimizer, plain = optimizer_of(mine), optimizer_of(other)
    expected = train(plain, other, "mlp", range(12))

    def closure(i: int) -> Tensor:
        optimizer.zero_grad()
        x, y = MODELS["mlp"][1](i)
        loss = Categorical().nll(mine(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(lambda i=i: closure(i)).item() for i in range(12)]
    assert losses == expected and torch.equal(parameters(mine), parameters(other))


def test_zero_grad_between_forward_and_backward_keeps_the_batch() -> None:
    mine, other = built("mlp"), built("mlp")
    optimizer, plain = optimizer_of(mine), optimizer_of(other)
    train(plain, other, "mlp", range(12))
    for i in range(12):
        x, y = MODELS["mlp"][1](i)
        loss = Categorical().nll(mine(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(parameters(mine), parameters(other))


def test_evaluation_between_steps_changes_nothing() -> None:
    mine, other = built("cnn"), built("cnn")
    optimizer, plain = optimizer_of(mine), optimizer_of(other)
    train(plain, other, "cnn", range(12))
    for i in range(12):
        train(optimizer, mine, "cnn", range(i, i + 1))
        mine.eval()
        mine(randn(5, 1, 6, 6))  # with gradients, and never differentiated
        optimizer.fishleg.accuracy(randn(5, 1, 6, 6), 1)
        ff.fisher_vector_product(mine, Categorical(), randn(5, 1, 6, 6), {"5.bias": torch.ones(3).double()})
        mine.train()
    assert torch.equal(parameters(mine), parameters(other))


def test_groups_have_their_own_rate_decay_and_damping() -> None:
    model = built("mlp")
    first, last = list(model[0].parameters()), list(model[2].parameters())  # type: ignore[index]
    optimizer = optimizer_of(
        model, params=[{"params": first, "lr": 0.0, "weight_decay": 0.5}, {"params": last, "lr": 0.1, "damping": 2.0}]
    )
    before = [p.detach().clone() for p in (*first, *last)]
    train(optimizer, model, "mlp", range(1))
    assert all(torch.equal(p, b) for p, b in zip(first, before[:2], strict=True))
    moved = torch.cat([last[0] - before[2], (last[1] - before[3])[:, None]], -1)
    assert torch.allclose(moved.norm(), torch.tensor(0.1 * 3**0.5).double())  # lr times the norm of the layer
    damping = optimizer.fishleg._curvature.damping()
    assert damping["2"].item() == 2.0 and damping["0"].item() not in {0.0, 2.0}
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1, 0.0
    second, other = [p.detach().clone() for p in first], [p.detach().clone() for p in last]
    train(optimizer, model, "mlp", range(1, 2))
    assert not torch.equal(first[0], second[0]) and all(torch.equal(p, b) for p, b in zip(last, other, strict=True))


def test_one_layer_may_be_in_two_groups_with_one_damping() -> None:
    model, same = built("mlp"), built("mlp")
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.2}, {"params": biases}]
    optimizer = optimizer_of(model, params=groups)
    plain = optimizer_of(same)
    for opt, m in ((optimizer, model), (plain, same)):
        train(opt, m, "mlp", range(1))
    start = built("mlp")
    for name, p in model.named_parameters():
        decayed = p + 0.03 * 0.2 * start.get_parameter(name) * (p.ndim > 1)
        assert torch.allclose(decayed, same.get_parameter(name))
    with pytest.raises(ValueError, match=r"different damping.*must share them"):
        ff.FishLeg(
            (again := built("mlp")), Categorical(),
            params=[{"params": [p for p in again.parameters() if p.ndim > 1], "damping": 1.0},
                    {"params": [p for p in again.parameters() if p.ndim == 1]}],
        )  # fmt: skip


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: t / 12),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [4],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_torch_set_the_rate(scheduler: str) -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for i in range(11):
        before = parameters(model[2])  # type: ignore[index]
        rates.append(float(optimizer.param_groups[0]["lr"]))
        loss = train(optimizer, model, "mlp", range(i, i + 1))[0]
        schedule.step(1.0) if scheduler == "plateau" else schedule.step()
        step = (parameters(model[2]) - before).norm()  # type: ignore[index]
        assert torch.allclose(step, torch.tensor(rates[-1] * 3**0.5).double(), atol=1e-9), (i, loss)
    assert len(set(rates)) > 2
    if scheduler == "onecycle":
        assert optimizer.fishleg.hyper.beta.item() == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=0.03)


def test_maximize_climbs() -> None:
    up, down = built("mlp"), built("mlp")
    a, b = optimizer_of(up, maximize=True), optimizer_of(down)
    x, y = MODELS["mlp"][1](0)
    (-Categorical().nll(up(x), y)).backward()
    Categorical().nll(down(x), y).backward()
    a.step()
    b.step()
    assert torch.equal(parameters(up), parameters(down))


def test_parameters_without_gradient_stay_and_keep_their_momentum() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, which: str) -> Tensor:
            out: Tensor = getattr(self, which)(x)
            return out

    torch.manual_seed(0)
    model = Branches().double()
    optimizer = optimizer_of(model)
    for i in range(25):
        which = "a" if i % 2 else "b"
        other = getattr(model, "b" if i % 2 else "a")
        before, m = parameters(other), optimizer.fishleg._momentum["b" if i % 2 else "a"].clone()
        optimizer.zero_grad()
        Categorical().nll(model(randn(12, 4, seed=i), which), labels(12, seed=i)).backward()
        optimizer.step()
        assert torch.equal(before, parameters(other))
        assert torch.equal(m, optimizer.fishleg._momentum["b" if i % 2 else "a"])
        p = optimizer.fishleg._averages
        for k in p.m:  # p = Q m stays true
            assert torch.allclose(p.p[k], optimizer.fishleg.q[k](p.m[k]), atol=1e-10)


def test_a_group_that_is_added_later_trains_and_keeps_what_was_learned() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model, params=model[2].parameters())  # type: ignore[index]
    train(optimizer, model, "mlp", range(12))
    first, learned = parameters(model[0]), optimizer.fishleg.q["2"].L.clone()  # type: ignore[index]
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})  # type: ignore[index]
    assert torch.equal(optimizer.fishleg.q["2"].L, learned) and not torch.equal(learned, torch.eye(7).double())
    assert torch.equal(first, parameters(model[0]))  # type: ignore[index]
    losses = train(optimizer, model, "mlp", range(12, 24))
    assert not torch.equal(first, parameters(model[0])) and all(x < 10 for x in losses)  # type: ignore[index]
    assert len(model._forward_hooks) == 1 and len(model[0]._forward_hooks) == 1  # type: ignore[index]
    with pytest.raises(ValueError, match="must be one of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2
    train(optimizer, model, "mlp", range(24, 26))


@pytest.mark.parametrize("at", [1, 5, 10, 13, 17])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_resuming_is_bit_exact(name: str, at: int) -> None:
    model = built(name).float()
    options: dict[str, Any] = {"update_aux_every": 4}

    def batches(i: int) -> tuple[Tensor, Tensor]:
        x, y = MODELS[name][1](i)
        return x.float(), y

    def run(optimizer: Any, model: nn.Module, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            x, y = batches(i)
            optimizer.zero_grad()
            Categorical().nll(model(x), y).backward()
            optimizer.step()

    optimizer = optimizer_of(model, **options)
    run(optimizer, model, range(at))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    run(optimizer, model, range(at, 22))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True, map_location="cpu")
    again = built(name).float()
    resumed = ff.FishLeg(again, Categorical(), generator=generator(99), **options)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, again, range(at, 22))
    assert torch.equal(parameters(model), parameters(again))
    assert_same_state(optimizer.fishleg.state_dict(), resumed.fishleg.state_dict())


def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed() -> None:
    model, other = built("mlp"), built("cnn")
    optimizer = optimizer_of(model)
    train(optimizer, model, "mlp", range(3))
    before = copy.deepcopy(optimizer.state_dict())
    strange = optimizer_of(other).state_dict()
    for bad in (strange, {**before, "state": {}}, {**before, "param_groups": strange["param_groups"]}):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert str(before["param_groups"]) == str(after["param_groups"])
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][0][k])) for k, v in before["state"][0].items()
    )


def test_a_loader_for_q_is_gone_through_and_its_position_resumed() -> None:
    taken: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for i in range(3):
                taken.append(i)
                yield MODELS["mlp"][1](i)

    model = built("mlp")
    optimizer = optimizer_of(model, aux_loader=Loader(), update_aux_every=4)
    train(optimizer, model, "mlp", range(9))  # Q is due in the steps 0, 1, 2, 3, 4, 8
    assert taken == [0, 1, 2, 0, 1, 2]
    state = optimizer.state_dict()
    again = built("mlp")
    again.load_state_dict(model.state_dict())
    resumed = optimizer_of(again, aux_loader=Loader(), update_aux_every=4)
    resumed.load_state_dict(state)
    for opt, m in ((optimizer, model), (resumed, again)):
        train(opt, m, "mlp", range(9, 20))
    assert torch.equal(parameters(model), parameters(again))


def bad_calls() -> dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]]:
    return {
        "no likelihood": (lambda m: ff.FishLeg(m), TypeError, "likelihood=None must be given"),
        "unknown": (lambda m: ff.FishLeg(m, Categorical(), momentums=1), TypeError, "momentums"),
        "strange": (lambda m: ff.FishLeg(m, Categorical(), params=[nn.Parameter(torch.ones(1))]), ValueError, "model"),
        "lr": (lambda m: ff.FishLeg(m, Categorical(), lr=-1.0), ValueError, "lr=-1.0 must be >= 0"),
        "beta": (lambda m: ff.FishLeg(m, Categorical(), beta=1.0), ValueError, "beta=1.0"),
        "damping": (lambda m: ff.FishLeg(m, Categorical(), damping=0.0), ValueError, "damping=0.0"),
        "both": (lambda m: ff.FishLeg(m, Categorical(), params=m.parameters(), include="0"), TypeError, "together"),
        "renamed": (lambda m: ff.FishLeg(m, Categorical(), u_sampling="gaussian"), TypeError, r"u_sampling \(use u\)"),
        "empirical": (lambda m: ff.FishLeg(m, Categorical(), fisher="empirical"), ValueError, "aux_loader="),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_bad_calls_are_refused_and_leave_no_hook(case: str) -> None:
    call, error, words = bad_calls()[case]
    model = built("mlp")
    with pytest.raises(error, match=words):
        call(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("taken", [0, 3])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_is_changed(taken: int) -> None:
    model = built("cnn")
    optimizer = optimizer_of(model, update_aux_every=2)
    train(optimizer, model, "cnn", range(taken))
    x, y = MODELS["cnn"][1](9)
    optimizer.zero_grad()
    Categorical().nll(model(x), y).backward()
    next(iter(model.parameters())).grad.fill_(float("nan"))  # type: ignore[union-attr]
    before, state, stream = parameters(model), optimizer.fishleg.state_dict(), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        optimizer.step()
    assert torch.equal(before, parameters(model)) and torch.equal(stream, torch.get_rng_state())
    assert_same_state(state, optimizer.fishleg.state_dict())
    train(optimizer, model, "cnn", range(taken, taken + 3))


def test_a_loop_that_does_not_call_the_model_is_told_so() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    Categorical().nll(model[2](model[0](randn(12, 4)).tanh()), labels(12)).backward()  # type: ignore[index]
    with pytest.raises(RuntimeError, match="no forward pass of the model"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    optimizer = optimizer_of(model)
    Categorical().nll(model(labels(4, 2)), labels(4)).backward()
    p = model[0].weight
    p.grad = None
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (5, 3))
    with pytest.raises(ValueError, match=r"\['0.weight'\] must be dense"):
        optimizer.step()


def test_removing_takes_all_hooks_off() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    optimizer.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    Categorical().nll(model(randn(12, 4)), labels(12)).backward()
    with pytest.raises(RuntimeError, match="removed"):
        optimizer.step()


def test_copies_are_refused() -> None:
    optimizer = optimizer_of(built("mlp"))
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(optimizer)


def test_sigma_is_learned_in_both_front_ends() -> None:
    x = randn(50, 4)
    y = x @ randn(4, 3, seed=1) + 0.2 * randn(50, 3, seed=2)
    sigmas = []
    for front in ("step", "optimizer"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        likelihood = Gaussian(1.0, learn_sigma=True)
        if front == "step":
            step = ff.fishlegify(model, likelihood, generator=generator(3))
            for _ in range(300):
                step(x, y)
        else:
            optimizer = optimizer_of(model, likelihood)
            for _ in range(300):
                optimizer.zero_grad()
                likelihood.nll(model(x), y).backward()
                optimizer.step()
        residual = (model(x) - y).square().mean().sqrt().item()
        sigmas.append(float(next(iter(likelihood.tensors().values())).detach().exp().mean()))
        assert sigmas[-1] == pytest.approx(residual, rel=0.05)
    assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-5)


def test_the_call_of_the_originals_readme_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(200, 4)
    y = torch.tanh(x @ torch.randn(4, 3))
    data = torch.utils.data.TensorDataset(x, y)
    aux_loader = torch.utils.data.DataLoader(data, shuffle=True, batch_size=50)
    likelihood = ff.FISH_LIKELIHOODS["FixedGaussian".lower()](sigma=1.0, device="cpu")
    with pytest.warns(UserWarning, match="eps has no effect"):
        optimizer = ff.FishLeg(
            model, likelihood, aux_loader, lr=0.02, eps=1e-4, beta=0.9, weight_decay=1e-5, update_aux_every=10,
            aux_lr=1e-3, aux_betas=(0.9, 0.999), aux_eps=1e-8, damping=0.3, pre_aux_training=25, sgd_lr=0.01,
            device="cpu",
        )  # fmt: skip
    losses = []
    for data_x, data_y in list(torch.utils.data.DataLoader(data, batch_size=50)) * 20:
        optimizer.zero_grad()
        loss = likelihood.nll(model(data_x), data_y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0


def test_the_call_with_draw_and_nll_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(60, 4), torch.rand(60, 3).round()
    likelihood = Bernoulli()

    def nll(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return likelihood.nll(model.forward(data[0]), data[1])

    def draw(model: nn.Module, data_x: Tensor) -> tuple[Tensor, Tensor]:
        return data_x, likelihood.sample(model.forward(data_x))

    optimizer = ff.FishLeg(model, draw, nll, [(x, y)], lr=0.3, damping=0.3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nll(model, (x, y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
