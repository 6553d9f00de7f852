"""What is logged is what happened, and logging changes nothing."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import generator
from loops import MODELS, assert_same_state, built, optimizer_of, parameters, train
from torch import nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical


def step_of(model: nn.Module, **options: Any) -> ff.FishLegStep:
    return ff.fishlegify(model, Categorical(), generator=generator(3), **options)


RULES = [(s, m) for s in ("layer", "kl", None) for m in ("nesterov", "before", "after") if (s, m) != ("kl", "after")]


@pytest.mark.parametrize(("step_norm", "momentum"), RULES)
def test_step_norms_are_how_far_the_parameters_moved(step_norm: str | None, momentum: str) -> None:
    model = built("mlp")
    step = step_of(model, step_norm=step_norm, momentum=momentum, damping=0.1, weight_decay=0.0)
    for i in range(3):
        before = {name: p.clone() for name, p in model.named_parameters()}
        step(*MODELS["mlp"][1](i))
    moves = {name: (p - before[name]).detach().norm() ** 2 for name, p in model.named_parameters()}
    found = step.statistics()
    for block in ("0", "2"):
        moved = (moves[f"{block}.weight"] + moves[f"{block}.bias"]).sqrt()
        assert found[f"fishleg/step_norm/{block}"] == pytest.approx(moved.item(), rel=1e-9)
    assert found["fishleg/step_norm"] == pytest.approx(sum(moves.values()).sqrt().item(), rel=1e-9)
    if step_norm is None:
        assert found["fishleg/step_norm/0"] == pytest.approx(3e-2 * found["fishleg/direction_norm/0"], rel=1e-9)


def test_the_auxiliary_loss_is_that_of_the_last_update_and_the_sum_of_its_terms() -> None:
    step = step_of(built("mlp"))
    x, y = MODELS["mlp"][1](0)
    value = step.update_aux(x, y).item()
    found = step.statistics()
    assert found["fishleg/auxiliary_loss"] == value != 0
    terms = [found[f"fishleg/auxiliary_loss/{block}"] for block in ("0", "2")]
    assert sum(terms) == pytest.approx(value, rel=1e-9) and all(terms)
    step(x, y)
    assert step.statistics()["fishleg/auxiliary_loss"] != value


def test_damping_skipped_and_accuracy_are_those_of_the_step() -> None:
    model, other = built("mlp"), built("mlp")
    step, twin = step_of(model), step_of(other)
    x, y = MODELS["mlp"][1](0)
    step(x, y), twin(x, y)
    found, accuracy = step.statistics(x, n=3), twin.accuracy(x, n=3)
    assert found["fishleg/damping"] == found["fishleg/damping/2"] == step.damping.item()
    assert found["fishleg/skipped"] == 0
    assert found["fishleg/accuracy"] == accuracy.overall
    assert {b: found[f"fishleg/accuracy/{b}"] for b in ("0", "2")} == accuracy.layers


def test_damping_is_each_groups_own_and_what_has_no_gradient_takes_no_step() -> None:
    model = built("mlp")
    groups = [
        {"params": model[0].parameters(), "damping": 0.5},
        {"params": model[2].parameters(), "damping": 0.25, "lr": 1e-3},
    ]
    optimizer = optimizer_of(model, params=groups)
    x, y = MODELS["mlp"][1](0)
    Categorical().nll(model(x), y).backward()
    for p in model[0].parameters():
        p.grad = None
    optimizer.step()
    found = optimizer.fishleg.statistics()
    assert (found["fishleg/damping/0"], found["fishleg/damping/2"]) == (0.5, 0.25)
    (length,) = (block.target_norm() for block in optimizer.fishleg.plan.blocks if block.name == "2")
    assert found["fishleg/step_norm/0"] == 0
    assert found["fishleg/step_norm/2"] == pytest.approx(1e-3 * length, rel=1e-6)
    assert found["fishleg/step_norm"] == found["fishleg/step_norm/2"]


def test_what_has_not_happened_is_nan_and_the_keys_stay() -> None:
    step = step_of(built("mlp"), update_aux_every=0)
    before = step.statistics()
    assert {name.split("/")[1] for name, value in before.items() if math.isnan(value)} == {
        "auxiliary_loss",
        "direction_norm",
        "step_norm",
    }
    step(*MODELS["mlp"][1](0))
    after = step.statistics()
    assert before.keys() == after.keys() and all(type(value) is float for value in after.values())
    assert math.isnan(after["fishleg/auxiliary_loss"]) and after["fishleg/step_norm"] > 0


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_logging_changes_no_bit_of_a_training(name: str) -> None:
    models = [built(name), built(name)]
    optimizers = [optimizer_of(model) for model in models]
    steps = [step_of(built(name)) for _ in range(2)]
    for i in range(14):
        streams = []
        for log, (optimizer, model, step) in enumerate(zip(optimizers, models, steps, strict=True)):
            train(optimizer, model, name, range(i, i + 1))
            x, y = MODELS[name][1](i)
            step(x, y)
            if log:
                optimizer.fishleg.statistics(x, n=2)
                step.statistics(x, n=2)
            streams.append(torch.get_rng_state())
        assert torch.equal(*streams)
    assert torch.equal(parameters(models[0]), parameters(models[1]))
    assert torch.equal(parameters(steps[0].model), parameters(steps[1].model))
    assert_same_state(optimizers[0].fishleg.state_dict(), optimizers[1].fishleg.state_dict())
    assert_same_state(steps[0].state_dict(), steps[1].state_dict())


@pytest.mark.slow
def test_a_compiled_step_is_measured_as_an_eager_one() -> None:
    found = []
    for backend in (None, "eager"):
        torch.compiler.reset()
        step = step_of(built("mlp"))
        run = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
        for i in range(2):
            run(*MODELS["mlp"][1](i))
        found.append(step.statistics())
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert not any(math.isnan(value) for value in found[0].values())
    x, y = MODELS["mlp"][1](2)
    run(x * math.nan, y)  # compiled: skipped
    assert step.statistics() == found[1] | {"fishleg/skipped": 1.0}


def test_csv_is_continued_and_refuses_other_names(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.csv"
    ff.logs.CSV(path).write(1, {"loss": 0.5, "b,c": math.nan})
    log = ff.logs.CSV(path)
    log.write(2, {"b,c": 1.0, "loss": 0.25})
    with pytest.raises(ValueError, match=r"'extra'.*must be in both"):
        log.write(3, {"loss": 0.1, "b,c": 1.0, "extra": 1.0})
    assert path.read_text() == 'step,loss,"b,c"\n1,0.5,nan\n2,0.25,1.0\n'


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step = step_of(built("mlp"))
    log = ff.logs.TensorBoard(tmp_path)
    for i in range(2):
        step(*MODELS["mlp"][1](i))
        log.write(i, step.statistics())
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    last = step.statistics()
    assert set(events.Tags()["scalars"]) == last.keys()
    for name, value in last.items():
        points = events.Scalars(name)
        assert [p.step for p in points] == [0, 1] and points[1].value == pytest.approx(value, rel=1e-6)


def test_without_tensorboard_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        ff.logs.TensorBoard(tmp_path)


def test_a_line_has_the_overall_numbers() -> None:
    step = step_of(built("mlp"))
    x, y = MODELS["mlp"][1](0)
    loss = step(x, y).item()
    words = ff.logs.line({"loss": loss, **step.statistics(x)}).split()
    assert words[::2] == ["loss", "A", "γ", "|Δθ|", "accuracy", "skipped"]
    assert float(words[1]) == pytest.approx(loss, rel=1e-2) and words[-1] == "0"
