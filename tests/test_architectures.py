"""Real architectures, made tiny: each trains, and the report names all of its parameters; what cannot work says so."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fishleg_func as ff

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = (
    "timm resnet18", "timm convnext_atto", "timm vit_tiny", "transformers GPT-2", "transformers BERT",
    "transformers Llama", "transformers T5", "transformers ViT", "transformers Whisper", "LSTM", "GRU", "U-Net",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _examples_on_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # nothing is downloaded: an attempt is an error
        yield
    sys.path.remove(str(EXAMPLES))


def load(name: str) -> Any:
    """Make a case of the zoo."""
    return importlib.import_module("zoo").CASES[name]()


def test_every_architecture_is_here() -> None:
    assert tuple(importlib.import_module("zoo").CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_reports_every_parameter(name: str) -> None:
    case = load(name)
    given = [x.clone() for x in torch.utils._pytree.tree_leaves(case.inputs) if isinstance(x, Tensor)]
    before = {key: p.detach().clone() for key, p in case.model.named_parameters()}
    step = case.step()
    losses = [step(case.inputs, case.targets).item() for _ in range(20)]
    assert sum(losses[-3:]) / 3 < 0.85 * losses[0]

    rows = step.report().rows
    assert [row.parameter for row in rows] == list(before)
    frozen = {key for key, p in case.model.named_parameters() if not p.requires_grad}
    assert {row.parameter for row in rows if not row.block} == frozen
    moved = {key for key, p in case.model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == before.keys() - frozen
    after = [x for x in torch.utils._pytree.tree_leaves(case.inputs) if isinstance(x, Tensor)]
    assert all(map(torch.equal, given, after))


class Reversed(nn.Module):
    """Layers, and the parameters of one, are registered in another order than they are used and packed in."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(4, 3), nn.Linear(5, 4)
        self.third = nn.Linear(3, 2, bias=False)
        weight = self.third.weight
        del self.third.weight
        self.third.bias = nn.Parameter(torch.zeros(2))
        self.third.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        return nn.functional.linear(torch.tanh(y), self.third.weight, self.third.bias)  # its hook does not fire


@pytest.mark.parametrize("swapped", [False, True])
def test_layers_may_be_used_in_any_order(swapped: bool) -> None:
    """The exact Fisher product agrees with the dense one, whatever the order of keys."""
    model = Reversed().double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    step = ff.fishlegify(model, ff.likelihoods.Gaussian())
    first = step(x, y)
    assert step(x, y) < first
    v = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    given = dict(reversed(v.items())) if swapped else v
    product = ff.fisher_vector_product(model, ff.likelihoods.Gaussian(), x, given)
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(
        {key: p.detach() for key, p in model.named_parameters()}
    )
    jv = sum(torch.tensordot(jacobian[key], v[key], v[key].ndim) for key in v)
    for key in v:
        torch.testing.assert_close(product[key], torch.tensordot(jv, jacobian[key], 1) / len(x))


class Greedy(nn.Module):
    """Changes its input, and the container that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.linear(batch.pop("x").mul_(2))
        return result


def test_a_model_may_change_its_inputs() -> None:
    model, plain = Greedy(), nn.Linear(3, 2)
    plain.load_state_dict(model.linear.state_dict())
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    batch = {"x": x.clone()}
    step, other = ff.fishlegify(model, ff.likelihoods.Gaussian()), ff.fishlegify(plain, ff.likelihoods.Gaussian())
    for _ in range(3):
        torch.testing.assert_close(step((batch,), y), other(2 * x, y))
    torch.testing.assert_close(model.linear.weight, plain.weight)
    assert torch.equal(batch["x"], x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))
        return result


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_nothing(reentrant: bool) -> None:
    model, x, y = Checkpointed(reentrant), torch.randn(4, 3), torch.randn(4, 2)
    plain = nn.Sequential(model.body, model.head)
    step, other = (ff.fishlegify(m, ff.likelihoods.Gaussian()) for m in (model, copy.deepcopy(plain)))
    for _ in range(3):
        torch.testing.assert_close(step(x, y), other(x, y))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_of_transformers_changes_nothing() -> None:
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        case = load("transformers GPT-2")
        if enabled:
            case.model.gradient_checkpointing_enable()
        step = case.step()
        losses.append([step(case.inputs, case.targets) for _ in range(3)])
    torch.testing.assert_close(*losses)


def test_what_torch_func_cannot_differentiate_is_told() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.fc(x).square().sum(), x, create_graph=True)
            result: Tensor = self.fc(x) * slope.sum()
            return result

    with pytest.raises(RuntimeError, match=r"calls torch\.autograd in forward.*use torch\.func"):
        ff.fishlegify(Inner(), ff.likelihoods.Gaussian())(torch.randn(4, 3), torch.randn(4, 2))


def test_an_output_that_is_an_object_names_the_remedy() -> None:
    case = load("transformers Llama")
    with pytest.raises(TypeError, match=r"output=lambda o: o\.logits"):
        ff.fishlegify(case.model, case.likelihood)(case.inputs, case.targets)


# --- the script that makes the table of the documentation ---


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("architectures")
    monkeypatch.setattr(module, "in_own_process", lambda name: "yes, 1 graph in 0 s")
    return module


def test_the_table_says_what_was_measured(architectures: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = architectures.main(["--only", "GRU", "--markdown"])
    assert row.after < row.before and row.plain_ms > 0 and row.learning_ms > 0
    head, _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"| GRU | {row.parameters:,} |") and f"{row.before:.3f}" in line and "1 graph" in line
    assert head.count("|") == line.count("|")


def test_what_does_not_compile_has_a_reason(architectures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*batch: Any) -> Tensor:
        raise RuntimeError("no | way\n  at all\nfrom user code: a line")

    monkeypatch.setattr(architectures.torch, "compile", lambda step, **_: refuse)
    assert architectures.compile_status("GRU") == "no: RuntimeError: no / way at all"


def test_every_row_of_the_documentation_is_of_the_zoo() -> None:
    page = (EXAMPLES.parent / "docs" / "architectures.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["architecture", "---", *NAMES]


def reported(readme: str) -> list[list[str]]:
    """Return the rows of the two reports in the README, as lists of cells."""
    excerpt = readme.split("```text\n", 1)[1].split("```")[0]
    return [[" ".join(line.split()) for line in part.splitlines()] for part in excerpt.split("\n\n")]


@pytest.mark.slow
@pytest.mark.parametrize(("i", "name"), list(enumerate(["transformers GPT-2", "timm resnet18, whole"])))
def test_the_reports_in_the_readme_are_real(i: int, name: str) -> None:
    zoo = importlib.import_module("zoo")
    printed = str((zoo.CASES | zoo.WHOLE)[name]().step().report()).splitlines()
    excerpt = reported((EXAMPLES.parent / "README.md").read_text())[i]
    assert len(excerpt) > 4
    assert not set(excerpt) - {" ".join(line.split()) for line in printed}
