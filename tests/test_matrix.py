"""The matrix of layer types and ways of training: every cell is tried, and the page says what was found."""

from __future__ import annotations

from pathlib import Path

import matrix
import pytest
from layer_types import LAYERS, Model
from matrix import MODES, NO, Reason, outcome, page, works
from torch import nn

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
ELSEWHERE = {  # layers of torch with parameters that are not in the matrix
    "SyncBatchNorm",  # is for several processes
    "AdaptiveLogSoftmaxWithLoss",  # is a loss
    "RNNBase", "RNNCellBase",  # are for subclasses
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_cell(name: str, mode: str) -> None:
    assert outcome(name, mode) == ((name, mode) not in NO)


def test_the_page_is_what_a_run_finds(request: pytest.FixtureRequest) -> None:
    found = page(outcome)
    if path := request.config.getoption("--matrix"):
        Path(path).write_text(found, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == found


def test_the_page_shows_what_does_not_work_and_why() -> None:
    everything, text = page(lambda name, mode: True), page(lambda name, mode: (name, mode) not in NO)
    assert " no " not in everything.split("\n| --- ")[1]
    assert "| GRU | yes | no (1) | yes |" in text and "\n1. torch does not compile" in text
    assert all(reason.words in text for reason in NO.values())
    with pytest.raises(KeyError):  # no "no" without a reason
        page(lambda name, mode: (name, mode) != ("Linear", "eager"))


def test_only_the_known_reason_counts() -> None:
    def fail() -> None:
        raise ValueError("because of this")

    known = Reason(ValueError, "this", "words")
    assert works(lambda: None, known) and not works(fail, known)
    for other in (None, Reason(TypeError, "this", ""), Reason(ValueError, "that", "")):
        with pytest.raises(ValueError, match="because"):
            works(fail, other)


@pytest.mark.parametrize("name", [name for name, mode in NO if mode == "accumulation"])
def test_what_does_not_accumulate_does_in_eval_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "train", lambda self, mode=True: nn.Module.train(self, False))
    matrix.accumulation(name)


def test_every_layer_of_torch_with_parameters_has_a_row() -> None:
    kinds = {name for name, kind in vars(nn).items() if hasattr(kind, "reset_parameters") and "Lazy" not in name}
    rows = {type(m).__name__ for layer in LAYERS.values() for m in layer.build().modules()}
    assert len(kinds) > 20 and kinds - rows == ELSEWHERE


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("compile", "exact")])
def test_a_step_that_does_nothing_is_seen(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishleg_func.engine.Engine._advance", lambda self, *args: None)
    with pytest.raises(AssertionError):
        MODES[mode]("Linear")
