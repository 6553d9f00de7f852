"""On a GPU all is as on a CPU; runs where there is one."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from after import CATEGORICAL, data, exact, mlp
from cases import CASES, assert_close, assert_same, generator, snapshot, targets_for
from loops import MODELS, built, optimizer_of, parameters
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

STEPS = 25  # the dense start, and two more updates of λ
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "paired": {"update_aux_every": 3, "momentum": "before", "u": "momentum", "step_norm": "kl"},
    "gaussian": {"u": "gaussian", "step_norm": None, "lr": 1e-2, "damping": 0.1, "momentum": "after"},
    "adam": {"aux_rule": "adam", "aux_lr": 1e-3, "update_aux_every": 10},
    "eigen": {"q": "eigen"},
    "kronecker": {"q": "kronecker"},
    "part": {"aux_batch_size": 4},
}


def moved(value: Any, device: str = GPU) -> Any:
    return tuple(x.to(device) for x in value) if isinstance(value, tuple) else value.to(device)


def trained(model: nn.Module, device: str, name: str, steps: int = STEPS, **options: Any) -> Tensor:
    """Train with the noise of a CPU generator, wherever the model is; return the parameters, on the CPU."""
    case = CASES[name]
    model = model.to(device)
    step = ff.fishlegify(model, CATEGORICAL, generator=generator(1), **options)
    for i in range(steps):
        x, y = case.inputs(seed=i), targets_for(case.model(), case.inputs(seed=i), "categorical", seed=i)
        step(moved(x, device), moved(y, device))
    assert {t.device.type for t in step.state_dict().values() if isinstance(t, Tensor)} == {device}
    return parameters(model).cpu()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_training_goes_as_on_a_cpu(name: str, options: str) -> None:
    here, there = (trained(CASES[name].model(), d, name, **OPTIONS[options]) for d in ("cpu", GPU))
    assert (here - parameters(CASES[name].model())).norm() > 1e-2
    assert_close(there, here, 1e-3 if options in ("adam", "eigen") else 1e-7, name)  # signs, and eigenvectors, turn


@pytest.mark.parametrize("name", MODELS)
def test_the_optimizer_takes_the_steps_of_the_step_function(name: str) -> None:
    mine, other = (built(name).to(GPU) for _ in range(2))
    for module in (*mine.modules(), *other.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer, step = optimizer_of(mine), ff.fishlegify(other, CATEGORICAL, generator=generator(3))
    for i in range(STEPS):
        x, y = moved(MODELS[name][1](i))
        optimizer.zero_grad()
        loss = CATEGORICAL.nll(mine(x), y)
        loss.backward()
        optimizer.step()
        assert abs(step(x, y) - loss) <= 1e-6
    assert_close(parameters(mine), parameters(other), 1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_compiled_and_eager_steps_agree(name: str) -> None:
    torch._dynamo.reset()
    case, results = CASES[name], []
    for compiled in (False, True):
        model = case.model().to(GPU)
        step: Any = ff.fishlegify(model, CATEGORICAL, generator=generator(1))
        run = torch.compile(step, fullgraph=True) if compiled else step
        for i in range(STEPS):
            x = case.inputs(seed=i)
            run(x.to(GPU), targets_for(case.model(), x, "categorical", seed=i).to(GPU))
        assert int(step.skipped) == 0
        results.append(parameters(model))
    assert_close(results[1], results[0], 1e-7)


def test_long_sides_compile_to_calls_that_agree() -> None:
    torch._dynamo.reset()
    results = []
    x, y = torch.randn(16, 160, generator=generator(0)).to(GPU), torch.randint(7, (16,), generator=generator(1)).to(GPU)
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(160, 200), nn.Tanh(), nn.Linear(200, 7)).double().to(GPU)
        step: Any = ff.fishlegify(model, CATEGORICAL, generator=generator(1))
        run = torch.compile(step, fullgraph=True) if compiled else step
        for _ in range(STEPS):
            run(x.double(), y)
        results.append(parameters(model))
    assert_close(results[1], results[0], 1e-7)


def test_a_checkpoint_moves_between_devices() -> None:
    case = CASES["cnn"]
    model = case.model().to(GPU)
    step = ff.fishlegify(model, CATEGORICAL, generator=generator(1))

    def go(model: nn.Module, step: ff.FishLegStep, steps: range) -> None:
        for i in steps:
            x = case.inputs(seed=i)
            y = targets_for(case.model(), x, "categorical", seed=i)
            step(moved(x, step.damping.device.type), moved(y, step.damping.device.type))

    go(model, step, range(12))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "step": step.state_dict()}, file)
    go(model, step, range(12, STEPS))
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    for device in ("cpu", GPU):
        again = case.model().to(device)
        resumed = ff.fishlegify(again, CATEGORICAL)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["step"])
        go(again, resumed, range(12, STEPS))
        assert_close(parameters(again).cpu(), parameters(model).cpu(), 1e-8, device)


@pytest.mark.parametrize("at", [0, 1, 5, 10, 11])
def test_a_refused_step_changes_nothing(at: int) -> None:
    model = built("cnn").to(GPU)  # with dropout: it draws from the GPU's stream
    step = ff.fishlegify(model, CATEGORICAL, generator=generator(1))
    for i in range(at):
        step(*moved(MODELS["cnn"][1](i)))
    x, y = moved(MODELS["cnn"][1](at))
    before, random = snapshot(model, step), torch.cuda.get_rng_state()
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        step(x, y)
    assert_same(before, snapshot(model, step))
    assert torch.equal(random, torch.cuda.get_rng_state())


def test_reduced_precision_trains() -> None:
    ends = {}
    for dtype in (None, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 5)).to(GPU)
        optimizer, scaler = ff.FishLeg(model, CATEGORICAL), torch.amp.GradScaler(GPU, enabled=dtype == torch.float16)
        x = torch.randn(64, 20, generator=generator(0)).to(GPU)
        y = x[:, :5].argmax(-1)
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast(GPU, dtype=dtype or torch.float32, enabled=dtype is not None):
                loss = CATEGORICAL.nll(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends[dtype] = loss.item()
    assert ends[None] < 0.5 and all(math.isfinite(end) and end < 1.3 * ends[None] + 0.05 for end in ends.values()), ends


def waits(function: Callable[[], object]) -> list[str]:
    """Return where the host waited for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]


@pytest.mark.parametrize("name", CASES)
def test_a_plain_step_waits_twice(name: str) -> None:
    case = CASES[name]
    model = case.model().to(GPU)
    x = case.inputs().to(GPU)
    y = targets_for(case.model(), case.inputs(), "categorical").to(GPU)
    step = ff.fishlegify(model, CATEGORICAL, generator=generator(1))
    for _ in range(11):
        step(x, y)
    assert len(found := waits(lambda: step(x, y))) <= 2, found  # for what the targets are, and for what is finite


def after(device: str) -> dict[str, Any]:
    """Every use of a curvature, on a device."""
    model, (x, y) = mlp().to(device), moved(data(), device)
    fisher = ff.reference.fisher(copy.deepcopy(model).cpu(), data()[0], "categorical")
    inverse = exact(copy.deepcopy(model).cpu(), fisher).to(device=device)
    operator = ff.FisherOperator(model, CATEGORICAL, [(x, None)], damping=0.1)
    u = {
        k: torch.sin(torch.arange(p.numel(), device=device).double()).view(p.shape) for k, p in model.named_parameters()
    }
    found: dict[str, Any] = {
        "product": operator @ u,
        "solve": operator.solve(u).x,
        "low rank": operator.inverse(4, generator=torch.Generator(device).manual_seed(0)) @ u,
        "inverse": inverse @ u,
        "diagonal": inverse.diagonal(),
        "logdet": {"": inverse.logdet()},
        "influence": {"": ff.influence_scores(model, CATEGORICAL, inverse, [(x, y)], [(x[:3], y[:3])])},
        "saliency": ff.pruning.saliency(model, inverse),
        "blocks": ff.pruning.block_inverse(model, CATEGORICAL, [(x, y)], damping=0.1) @ u,
    }
    posterior = ff.Laplace(model, CATEGORICAL, inverse, [(x, y)])
    found["posterior"] = {"": posterior.predict(x[:3])}
    masks = ff.pruning.prune(model, inverse, sparsity=0.3).masks
    found["pruned"] = {k: p.detach() for k, p in model.named_parameters()} | {f"{k} mask": m for k, m in masks.items()}
    return found


def test_what_follows_training_agrees() -> None:
    here, there = after("cpu"), after(GPU)
    for key, tensors in here.items():
        if key == "low rank":  # from another random start
            continue
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                assert_close(there[key][name].cpu(), tensor, 1e-8, f"{key} {name}")
            else:
                assert torch.equal(there[key][name].cpu(), tensor), f"{key} {name}"
        assert all(t.device.type == GPU for t in there[key].values()), key


def test_an_estimate_and_statistics() -> None:
    model, (x, y) = mlp().to(GPU), moved(data())
    inverse = ff.estimate_inverse_fisher(model, CATEGORICAL, [(x, y)], damping=0.1, updates=20)
    assert all(t.device.type == GPU for t in inverse.diagonal().values())
    step = ff.fishlegify(model, Gaussian())
    step(x, model(x).detach() + 1)
    assert step.statistics(x)["fishleg/accuracy"] > 0


def test_another_device_is_named() -> None:
    step = ff.fishlegify(mlp().to(GPU), Categorical())
    with pytest.raises(ValueError, match="cuda"):
        step(*data())


def test_cuda_graphs_take_plain_steps() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case, results = CASES["mlp"], []
    for compiled in (False, True):
        model = case.model().to(GPU)
        step: Any = ff.fishlegify(model, CATEGORICAL, update_aux_every=10, generator=generator(1))
        graphed = torch.compile(step, fullgraph=True, mode="reduce-overhead") if compiled else step
        for i in range(20):
            x = case.inputs(seed=i)
            run = step if step.due else graphed
            run(x.to(GPU), targets_for(case.model(), x, "categorical", seed=i).to(GPU))
        results.append(parameters(model))
    assert_close(results[1], results[0], 1e-7)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
