"""Defects of the original's optimizer, of its running, packaging and examples; see test_predecessor.py."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import MODELS, assert_same_state, built, optimizer_of, parameters, train
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical

ROOT = Path(__file__).parent.parent
SOURCES = [
    p for folder in ("src", "examples", "docs") for p in (ROOT / folder).rglob("*.py") if "_build" not in p.parts
]


def test_d30_every_group_is_updated() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model, params=[{"params": model[0].parameters()}])  # type: ignore[index]
    optimizer.add_param_group({"params": model[2].parameters()})  # type: ignore[index]
    before = [p.clone() for p in model.parameters()]
    train(optimizer, model, "mlp", range(1))
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_d47_step_takes_a_closure_and_returns_its_loss() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    x, y = MODELS["mlp"][1](0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = Categorical().nll(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == Categorical().nll(built("mlp")(x), y).item()


def test_d48_the_moments_of_lambda_are_in_the_state() -> None:
    optimizer = optimizer_of(built("mlp"), aux_rule="adam", aux_lr=1e-3)
    names = optimizer.state_dict()["state"][0]
    assert {"adam.first.0.L", "adam.second.2.R", "adam.count"} <= names.keys()


def test_d49_what_a_group_holds_is_read() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    assert set(optimizer.param_groups[0]) - {"params", "param_names"} == {
        "lr", "weight_decay", "damping", "betas", "maximize",
    }  # fmt: skip
    values = {"lr": 0.5, "weight_decay": 0.25, "damping": 0.125, "betas": (0.75,)}
    optimizer.param_groups[0].update(values)
    train(optimizer, model, "mlp", range(1))
    hyper = optimizer.fishleg.hyper
    assert [float(t) for t in (hyper.lr, hyper.weight_decay, hyper.damping, hyper.beta)] == [0.5, 0.25, 0.125, 0.75]


def test_d50_no_default_is_mutable() -> None:
    for function in (ff.fishlegify, ff.FishLeg.__init__, ff.estimate_inverse_fisher, ff.fisher_vector_product):
        defaults = [p.default for p in inspect.signature(function).parameters.values()]
        assert not any(isinstance(d, (list, dict, set)) for d in defaults)


def test_d51_nothing_is_moved_to_a_device_by_default() -> None:
    model = nn.Linear(4, 3, device="meta")
    assert all(p.device.type == "meta" for q in ff.fishlegify(model).q.values() for p in q.parameters())
    with pytest.raises(ValueError, match=r"device='cuda' must be 'cpu', where the model is"):
        ff.FishLeg(built("mlp"), Categorical(), [1], device="cuda")


def test_d52_probes_have_the_dtype_of_the_parameters_and_leave_the_stream() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model, u="gaussian")
    train(optimizer, model, "mlp", range(1))
    state = torch.get_rng_state()
    x, y = MODELS["mlp"][1](0)
    Categorical().nll(model(x), y).backward()
    optimizer.step()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.dtype == torch.float64 for q in optimizer.fishleg.q.values() for p in q.parameters())


def test_d53_the_loader_is_not_started_anew_for_each_update() -> None:
    begun: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            begun.append(1)
            return iter([MODELS["mlp"][1](i) for i in range(5)])

    model = built("mlp")
    train(optimizer_of(model, aux_loader=Loader()), model, "mlp", range(10))  # ten updates of Q
    assert len(begun) == 2


def test_d54_batches_may_be_dicts_and_outputs_objects() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.fc(x)
            return {"loss": Categorical().nll(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Named()
    x, y = MODELS["mlp"][1](0)
    batch = {"x": x.float(), "labels": y}
    optimizer = ff.FishLeg(model, Categorical(), aux_loader=[batch], output=lambda out: out["logits"])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        out = model(**batch)
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


def test_d55_a_step_compiles_whole() -> None:
    torch._dynamo.reset()
    model = built("mlp")
    step = torch.compile(ff.fishlegify(model, Categorical()), fullgraph=True, backend="aot_eager")
    first = step(*MODELS["mlp"][1](0))
    assert step(*MODELS["mlp"][1](0)) < first


def test_d56_the_error_about_sparse_gradients_is_about_them() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    optimizer = ff.FishLeg(model, Categorical())
    model[0].weight.grad = torch.eye(5, 3).to_sparse()
    with pytest.raises(ValueError, match=r"0\.weight.*dense.*sparse=False"):
        optimizer.step()


def test_d57_labels_are_drawn_from_a_stream_of_their_own() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model, fisher="sampled")
    state = torch.get_rng_state()
    x, y = MODELS["mlp"][1](0)
    Categorical().nll(model(x), y).backward()
    optimizer.step()
    assert torch.equal(state, torch.get_rng_state())


def test_d58_a_last_parameter_without_gradient_is_no_obstacle() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(x)
            return logits

    torch.manual_seed(0)
    model = Unused().double()
    optimizer = optimizer_of(model)
    before = parameters(model.unused)
    train(optimizer, model, "mlp", range(12))
    assert torch.equal(before, parameters(model.unused)) and optimizer.report().rows[-1].block == "unused"


def test_d59_updates_of_q_run_the_model_without_touching_its_buffers() -> None:
    model, plain = built("cnn"), built("cnn")
    optimizer = optimizer_of(model)
    x, y = MODELS["cnn"][1](0)
    Categorical().nll(model(x), y).backward()
    optimizer.step()
    plain(x)  # one forward pass of the user's own
    assert_same_state(dict(plain.named_buffers()), dict(model.named_buffers()))


ALONE = """
import sys
for name in ("transformers", "tensorboard", "scipy", "sklearn", "matplotlib", "rich", "timm"):
    sys.modules[name] = None
import fishleg_func
"""


def test_d66_importing_needs_torch_and_einops_only() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_d68_the_examples_of_the_docstrings_are_there_to_be_run() -> None:
    for thing in (ff.fishlegify, ff.FishLeg, ff.InverseFisher, ff.FisherOperator, ff.estimate_inverse_fisher):
        assert ">>> " in (inspect.getdoc(thing) or "")


def test_d69_every_argument_is_documented_and_every_documented_one_is_there() -> None:
    for function, text in ((ff.fishlegify, ff.fishlegify.__doc__), (ff.FishLeg.__init__, ff.FishLeg.__doc__)):
        arguments = (text or "").split("Args:")[1].split("Returns:")[0].split("Attributes:")[0].split("Raises:")[0]
        documented = re.findall(r"^        \**(\w+): ", arguments, re.MULTILINE)
        assert documented == [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("words", ["CUDA_VISIBLE_DEVICES", "except:", "/= m", 'append("../src'])
def test_d74_d77_examples_hide_nothing_and_choose_no_device(words: str) -> None:
    assert [str(p) for p in SOURCES if words in p.read_text()] == []


def test_d75_one_license() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "MIT" not in (ROOT / "README.md").read_text()
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
