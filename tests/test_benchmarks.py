"""The benchmarks: that they run, and that what they report is computed from what they measured. No time is judged."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fishleg_func as ff

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def step_cost() -> ModuleType:
    return importlib.import_module("step_cost")


@pytest.fixture
def scaling() -> ModuleType:
    return importlib.import_module("scaling")


def test_step_cost_reports_ratios_memory_and_state(
    step_cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_cost, "MIN_REPS", 2)
    file = tmp_path / "costs.json"
    arguments = ["--models", "mlp", "--methods", "fishleg", "muon", "--reps", "2", "--threads", "1"]
    (found,) = step_cost.main([*arguments, "--json", str(file)])
    assert found.parameters == 2 * (8 * 8 + 8)
    adamw, fishleg, muon = found.costs
    assert [c.method for c in found.costs] == ["adamw", "fishleg", "muon"]
    assert fishleg.ratios.keys() == {"amortized", "plain", "auxiliary", "refresh"}
    assert adamw.ratios.keys() == muon.ratios.keys() == {"amortized"}
    assert all(r > 0 for c in found.costs for r in c.ratios.values())
    assert adamw.state_bytes == 2 * 4 * found.parameters + 4 * 4  # two moments, and a count for each parameter
    assert all(c.peak_bytes is not None and c.peak_bytes > 2**20 for c in found.costs)
    assert json.loads(file.read_text())["models"][0]["parameters"] == found.parameters
    assert "mlp" in capsys.readouterr().out


def test_step_cost_counts_a_period_of_the_schedule(step_cost: ModuleType) -> None:
    assert step_cost.SHARES == {"plain": 72 / 80, "auxiliary": 7 / 80, "refresh": 1 / 80}
    assert [step_cost.kind(t) for t in (400, 401, 410, 480)] == ["refresh", "plain", "auxiliary", "refresh"]


@pytest.mark.parametrize("arguments", [["--reps", "2"], ["--threads", "0"], ["--methods", "original"]])
def test_step_cost_refuses(step_cost: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        step_cost.main(arguments)


@pytest.mark.slow
def test_scaling_fits_what_it_measured(scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dataclasses.replace(scaling.SWEEPS["depth"], quick=(1, 2, 4))
    monkeypatch.setitem(scaling.SWEEPS, "depth", tiny)
    picture = tmp_path / "scaling.png"
    arguments = ["--sweeps", "depth", "--quick", "--threads", "1", "--reps", "1", "--picture", str(picture)]
    fits = scaling.main(arguments)["depth"]
    assert fits["state"].sizes == (1, 2, 4) and all(v > 0 for f in fits.values() for v in f.values)
    assert 0.5 < fits["state"].exponent < 1.1 and fits["state"].verdict == "PASS"
    assert picture.stat().st_size > 1000


def test_scaling_judges_exponents(scaling: ModuleType) -> None:
    sizes = (10, 20, 40, 80)
    square = scaling.fit(sizes, tuple(float(n**2) for n in sizes), 2)
    assert square.exponent == pytest.approx(2) and square.verdict == "PASS"
    assert scaling.fit(sizes, square.values, 1).verdict == "FAIL"
    assert scaling.fit((10,), (1.0,), 1).verdict == "FAIL"


def test_a_vocabulary_of_50_000_allocates_no_square() -> None:
    words = 50_000
    model = torch.nn.Sequential(torch.nn.Embedding(words, 16), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    step = ff.fishlegify(model, ff.likelihoods.Categorical())
    x, y = torch.randint(words, (8, 4)), torch.randint(3, (8,))
    step(x, y)
    assert max(t.numel() for t in step.state_dict().values() if isinstance(t, torch.Tensor)) == words * 16


def test_profile_counts_operations_over_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.import_module("profile_step").main(["--model", "mlp", "--reps", "2", "--threads", "1"])
    assert found.keys() == {"AdamW", "plain", "auxiliary", "refresh", "amortized"}
    assert all(ratio > 1 for ratio in found.values())
    printed = capsys.readouterr().out
    assert "aten::mm" in printed and "GFLOP/s" in printed
