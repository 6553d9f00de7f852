"""The trainers of others: each example trains, and goes on bit for bit; Q learns from what has a loss."""

import csv
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import fishleg_func as ff

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples can be imported, and accelerate has forgotten the test before."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def lightning_digits() -> ModuleType:
    return importlib.import_module("lightning_digits")


@pytest.fixture
def huggingface() -> ModuleType:
    return importlib.import_module("huggingface_trainer")


@pytest.fixture
def loop() -> ModuleType:
    return importlib.import_module("accelerate_loop")


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- Lightning ---


def test_lightning_example_goes_on_from_its_checkpoint(lightning_digits: ModuleType, tmp_path: Path) -> None:
    whole, trainer, _ = lightning_digits.fit(tmp_path / "whole", 4, 4)
    half, _, checkpoint = lightning_digits.fit(tmp_path / "half", 2, 4)
    rest, _, _ = lightning_digits.fit(tmp_path / "rest", 4, 4, checkpoint)
    assert half.losses + rest.losses == whole.losses
    assert torch.equal(parameters(rest), parameters(whole))
    assert whole.losses[-1] < 0.4 * whole.losses[0]
    assert trainer.callback_metrics["accuracy"] > 0.85

    with next((tmp_path / "whole").rglob("metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fishleg/step_norm/2"]]
    assert len(rows) > 3 and all(float(row["fishleg/step_norm/2"]) > 0 for row in rows)


def test_lightning_calls_the_closure_once_and_zeroes_after_the_forward_pass(
    lightning_digits: ModuleType, tmp_path: Path
) -> None:
    """The batch that Q learns from is seen although gradients are zeroed between forward and backward."""
    module, trainer, _ = lightning_digits.fit(tmp_path, 1, 1)
    fishleg = trainer.optimizers[0].fishleg
    assert len(module.losses) == fishleg.steps == 12
    assert not math.isnan(fishleg.statistics()["fishleg/auxiliary_loss"])


# --- transformers ---


def test_trainer_example_goes_on_from_its_checkpoint(huggingface: ModuleType, tmp_path: Path) -> None:
    args = huggingface.arguments(str(tmp_path), 40)
    data = huggingface.Counting()
    whole = huggingface.FishLegTrainer(huggingface.tiny_gpt2(), args, train_dataset=data)
    losses = huggingface.train(whole)
    rest = huggingface.FishLegTrainer(huggingface.tiny_gpt2(), args, train_dataset=data)
    assert huggingface.train(rest, str(tmp_path / "checkpoint-20")) == losses
    assert torch.equal(parameters(rest.model), parameters(whole.model))
    assert losses[-1] < 0.4 * losses[0]
    assert whole.state.log_history[0]["fishleg/step_norm"] > 0


def test_three_ways_to_give_the_trainer_the_optimizer_are_one(huggingface: ModuleType, tmp_path: Path) -> None:
    from transformers import Trainer, get_scheduler

    def made_by(way: str) -> Any:
        model = huggingface.tiny_gpt2()
        args = huggingface.arguments(str(tmp_path), 12)
        data = huggingface.Counting()
        if way == "subclass":
            return huggingface.FishLegTrainer(model, args, train_dataset=data)
        if way == "optimizers":
            optimizer = huggingface.fishleg_of(model)
            schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=12)
            return Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule))
        keywords = {"likelihood": ff.likelihoods.Categorical(), "output": lambda out: out.logits}
        made = (ff.FishLeg, {"model": model, **keywords})
        return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=made)

    found = []
    for way in ("subclass", "optimizers", "class"):
        trainer = made_by(way)
        huggingface.train(trainer)
        found.append(parameters(trainer.model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_trainer_trains_in_bfloat16(huggingface: ModuleType, tmp_path: Path) -> None:
    final = []
    for bf16 in (False, True):
        args = huggingface.arguments(str(tmp_path), 40, bf16=bf16)
        trainer = huggingface.FishLegTrainer(huggingface.tiny_gpt2(), args, train_dataset=huggingface.Counting())
        final.append(huggingface.train(trainer)[-1])
    assert final[1] == pytest.approx(final[0], rel=0.1) and final[0] != final[1]


def test_trainer_checkpoints_activations(huggingface: ModuleType, tmp_path: Path) -> None:
    final = []
    for checkpointing in (False, True):
        args = huggingface.arguments(str(tmp_path), 14, gradient_checkpointing=checkpointing)
        trainer = huggingface.FishLegTrainer(huggingface.tiny_gpt2(), args, train_dataset=huggingface.Counting())
        final.append(huggingface.train(trainer))
    assert final[1] == pytest.approx(final[0], rel=1e-4) and final[0][-1] < final[0][0]


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_lightning_in_bfloat16_and_with_micro_batches(lightning_digits: ModuleType, options: dict[str, Any]) -> None:
    lightning = lightning_digits.lightning
    lightning.seed_everything(0, verbose=False)
    module = lightning_digits.Digits(steps=36)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, *lightning_digits.loaders())
    assert module.losses[-1] < 0.8 * module.losses[0]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_q_learns_from_the_tokens_that_have_a_loss(huggingface: ModuleType, precision: str) -> None:
    """Labels are shifted within the model, padding has none, and accelerate casts the outputs after the loss."""
    model = huggingface.tiny_gpt2()
    optimizer = huggingface.fishleg_of(model)
    data = huggingface.Counting()
    batch = {key: torch.stack([data[i][key] for i in range(8)]) for key in data[0]}
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared = accelerator.prepare(model)
    accelerator.backward(prepared(**batch).loss)
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    kept = (labels != -100).float()
    assert 0.3 < kept.mean() < 0.9
    assert torch.equal(optimizer.batch()._weight().reshape_as(kept), kept / kept.sum())


# --- accelerate ---


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_example_goes_on_from_its_state(loop: ModuleType, tmp_path: Path, precision: str) -> None:
    whole = loop.Loop(precision, epochs=4)
    losses = [*whole.epoch(), *whole.epoch()]
    whole.accelerator.save_state(str(tmp_path / "half"))
    log = ff.logs.CSV(tmp_path / "log.csv")
    last = [*whole.epoch(log), *whole.epoch(log)]
    rest = loop.Loop(precision, epochs=4)
    rest.accelerator.load_state(str(tmp_path / "half"))
    assert [*rest.epoch(), *rest.epoch()] == last
    assert torch.equal(parameters(rest.model), parameters(whole.model))
    assert last[-1] < 0.5 * losses[0]
    assert whole.fishleg.fishleg.steps == 4 * 12
    assert len(log.path.read_text().splitlines()) == 1 + 2 * 12


def test_accelerate_trains_in_bfloat16_to_the_loss_of_float32(loop: ModuleType) -> None:
    final = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = loop.Loop(precision, epochs=4)
        dtypes = set()
        made.model[0].register_forward_hook(lambda m, i, out, seen=dtypes: seen.add(out.dtype))
        final.append(loop.mean([loss for _ in range(4) for loss in made.epoch()][-23:]))
        assert (torch.bfloat16 in dtypes) == (precision == "bf16")
    assert final[0] != final[1] and final[1] == pytest.approx(final[0], rel=0.02)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("lightning_digits", ["--epochs", "2"], "resumed: loss"),
        ("huggingface_trainer", ["--steps", "10"], "resumed half way: loss"),
        ("accelerate_loop", ["--epochs", "2"], "epoch 1, resumed: loss"),
    ],
)
def test_examples_run_as_programs(
    name: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    importlib.import_module(name).main()
    assert said in capsys.readouterr().out
