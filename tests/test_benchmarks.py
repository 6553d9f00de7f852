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
    arguments = ["--models", "mlp", "--methods", "fishleg", "muon", "optimizer", "--reps", "2", "--threads", "1"]
    (found,) = step_cost.main([*arguments, "--json", str(file)])
    assert found.parameters == 2 * (8 * 8 + 8)
    adamw, fishleg, muon, optimizer = found.costs
    assert [c.method for c in found.costs] == ["adamw", "fishleg", "muon", "optimizer"]
    assert fishleg.ratios.keys() == optimizer.ratios.keys() == {"amortized", "plain", "statistics", "refresh"}
    assert adamw.ratios.keys() == muon.ratios.keys() == {"amortized"}
    assert all(r > 0 for c in found.costs for r in c.ratios.values())
    assert adamw.state_bytes == 2 * 4 * found.parameters + 4 * 4  # two moments, and a count for each parameter
    assert all(c.peak_bytes is not None and c.peak_bytes > 2**20 for c in found.costs)
    assert json.loads(file.read_text())["models"][0]["parameters"] == found.parameters
    assert "mlp" in capsys.readouterr().out


def test_step_cost_counts_a_period_of_the_schedule(step_cost: ModuleType) -> None:
    assert step_cost.shares(10) == {"plain": 288 / 320, "statistics": 31 / 320, "refresh": 1 / 320}
    assert step_cost.shares(2) == {"plain": 160 / 320, "statistics": 159 / 320, "refresh": 1 / 320}
    assert step_cost.shares(1) == {"statistics": 319 / 320, "refresh": 1 / 320}
    assert (step_cost.STEADY.start, step_cost.STEADY.stop) == (3200, 3520)
    assert [step_cost.kind(t, 10) for t in (800, 801, 960, 3360)] == ["refresh", "plain", "refresh", "statistics"]
    assert [step_cost.kind(t, 5) for t in (800, 802, 805, 3360)] == ["refresh", "plain", "statistics", "statistics"]


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
    assert found.keys() == {"AdamW", "plain", "statistics", "refresh", "amortized"}
    assert all(ratio > 1 for ratio in found.values())
    printed = capsys.readouterr().out
    assert "aten::mm" in printed and "GFLOP/s" in printed


# The race


@pytest.fixture
def race() -> ModuleType:
    return importlib.import_module("race")


def run(race: ModuleType, method: str, rate: float, seed: int, *losses: float) -> object:
    points = [race.Point(10 * i, float(i), loss, loss, 0.5) for i, loss in enumerate(losses)]
    return race.Run(method, rate, seed, tuple(points))


def book(*runs: object) -> dict[tuple[str, float, int], object]:
    return {(r.method, r.rate, r.seed): r for r in runs}  # type: ignore[attr-defined]


def test_race_extends_a_grid_whose_best_is_at_an_end(race: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(race.GRIDS, "adamw", (1.0, 2.0, 4.0, 8.0))
    assert race.missing("adamw", {}, 2) == [("adamw", rate, 0) for rate in (1.0, 2.0, 4.0, 8.0)]
    inside = book(*(run(race, "adamw", rate, 0, 9, loss) for rate, loss in ((1.0, 5), (2.0, 3), (4.0, 4), (8.0, 6))))
    assert race.missing("adamw", inside, 2) == [("adamw", 2.0, 1)]
    at_the_end = inside | book(run(race, "adamw", 8.0, 0, 9, 1))
    assert race.missing("adamw", at_the_end, 2) == [("adamw", 16.0, 0)]
    at_the_start = inside | book(run(race, "adamw", 1.0, 0, 9, 1))
    assert race.missing("adamw", at_the_start, 2) == [("adamw", 0.5, 0)]
    extended = at_the_end | book(*(run(race, "adamw", 8.0 * 2**i, 0, 9, 1 - i) for i in range(1, 5)))
    assert race.missing("adamw", extended, 1) == []  # no further than allowed


def test_race_runs_fishleg_at_its_default_only(race: ModuleType) -> None:
    assert race.missing("fishleg", {}, 2) == [("fishleg", 0.03, 0)]
    method = "fishleg damping=1e-3 u='momentum'"
    assert race.missing(method, book(run(race, method, 0.03, 0, 1)), 2) == [(method, 0.03, 1)]
    assert race.settings(method) == ("fishleg", {"damping": 1e-3, "u": "momentum"})


def test_race_reports_steps_and_seconds_to_the_rival(race: ModuleType) -> None:
    arguments = ["--task", "digits", "--methods", "fishleg", "adamw", "kfac", "--seeds", "1"]
    runs = book(
        run(race, "fishleg", 0.03, 0, 9, 4, 3, 1), run(race, "adamw", 1.0, 0, 9, 8, 6, 4),
        run(race, "adamw", 2.0, 0, 9, 8, 7, 5), run(race, "kfac", 1.0, 0, 9, float("inf")),
    )  # fmt: skip
    cells = [list(column.cells) for column in race.table(race.parse(arguments), runs).columns]
    assert cells[1] == ["0.03", "1", "1"] and cells[3] == ["1", "4", "inf"]
    assert cells[-2:] == [["33%", "100%", "never"], ["1.0", "3.0", "never"]]
    assert len(race.picture(race.parse(arguments), runs).axes[0].lines) == 2
    cells = [list(column.cells) for column in race.table(race.parse([*arguments[:3], "fishleg"]), runs).columns]
    assert cells[-2:] == [[""], [""]]  # no rival
    more = runs | book(run(race, "fishleg", 0.03, 1, 9, 9))
    assert next(iter(race.table(race.parse(arguments), more).columns[3].cells)) == "1"  # of --seeds 1 only
    broken = book(run(race, "fishleg", 0.03, 0, float("inf")))
    race.picture(race.parse([*arguments[:3], "fishleg"]), broken)


@pytest.mark.slow
def test_race_goes_on_where_it_stopped(race: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plot = tmp_path / "race.json", tmp_path / "race.png"
    arguments = ["--task", "digits", "--methods", "fishleg", "muon", "--budget", "0.5", "--json", str(file)]
    monkeypatch.setitem(race.GRIDS, "muon", (1e-3,))
    monkeypatch.setattr(race, "MOST_EXTENSIONS", 0)
    runs = race.main([*arguments, "--seeds", "1", "--plot", str(plot)])
    assert [(r.method, r.seed) for r in runs] == [("fishleg", 0), ("muon", 0)] and plot.stat().st_size > 1000
    for one in runs:
        assert one.points[0].step == 0 and one.points[-1].step == 14 and one.final < one.points[0].test_loss
        assert one.points[-1].accuracy is not None and one.points[-1].seconds > 0
    before = file.read_text()
    assert race.main([*arguments, "--seeds", "1"]) == runs and file.read_text() == before
    assert [r.seed for r in race.main([*arguments, "--seeds", "2"])] == [0, 0, 1, 1]
    with pytest.raises(SystemExit, match="holds another race, with batch_size=50 instead of 20"):
        race.main([*arguments, "--batch-size", "20"])
    file.write_text(before[:-100])
    with pytest.raises(SystemExit, match="must be a file that a race has written"):
        race.main([*arguments, "--seeds", "1"])


def test_a_run_that_breaks_down_counts_as_infinite(race: ModuleType) -> None:
    config = race.parse(["--task", "digits", "--budget", "0.5"])
    assert race.train(config, "adamw", 1e30, 0).final == float("inf")
    assert race.train(config, "fishleg", 1e30, 0).final == float("inf")


ORIGINAL = """
import torch

FishAuxParameter = torch.nn.Parameter
FISH_LIKELIHOODS = {"softmax": lambda device: None}
initialise_FishModel = lambda model, layers, fish_scale: model

class FishLeg(torch.optim.SGD):
    def __init__(self, model, auxiliary, likelihood, device, damping=0.5):
        super().__init__(model.parameters(), lr=0.0)
        self.defaults["update_aux_every"], self.aux_opt = 1, self

    def step(self):
        parameter = self.param_groups[0]["params"][0]
        if self.param_groups[0]["lr"] > 1:
            parameter.data.fill_(torch.nan)
        raise ValueError("Expected parameter logits to satisfy the constraint Real()")
"""


def test_of_what_the_original_raises_only_what_follows_from_nan_is_a_breakdown(
    race: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "optim" / "FishLeg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(ORIGINAL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    standing_in = ("transformers.models.bert.modeling_bert", "torch.utils.tensorboard")
    for name in {"optim", "optim.FishLeg", *standing_in} - sys.modules.keys():
        monkeypatch.setitem(sys.modules, name, None)  # so that what takes its place leaves again
        del sys.modules[name]
    config = race.parse(["--task", "digits", "--budget", "0.5", "--original", str(tmp_path)])
    assert race.train(config, "original", 2.0, 0).final == float("inf")
    with pytest.raises(ValueError, match="Real"):
        race.train(config, "original", 0.5, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--methods", "sgd"],
        ["--methods", "original"],
        ["--methods", "adamw weight_decay=1"],
        ["--methods", ""],
        ["--methods", "fishleg lr=1"],
        ["--methods", "fishleg q=kfac"],
        ["--methods", "fishleg damping"],
        ["--budget", "-1"],
        ["--budget", "0"],
        ["--budget", "inf"],
        ["--budget", "0.001"],
        ["--batch-size", "0"],
        ["--batch-size", "100000"],
        ["--seeds", "0"],
    ],
)
def test_race_refuses(race: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        race.main(["--task", "digits", *arguments])


def test_inverse_measures_both_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inverse, plot = importlib.import_module("inverse"), tmp_path / "inverse.png"
    found = inverse.main(["--networks", "linear", "--steps", "20", "--points", "2", "--plot", str(plot)])["linear"]
    assert found.keys() == inverse.METHODS.keys() and plot.stat().st_size > 1000
    for points in found.values():
        assert [p.step for p in points] == [10, 20]
        assert all(0 < p.matrix_bound < p.matrix and p.gradient_bound > 0 for p in points)
    assert "deep linear network" in capsys.readouterr().out


def test_conjugate_counts_iterations_that_solve(capsys: pytest.CaptureFixture[str]) -> None:
    conjugate = importlib.import_module("conjugate")
    arguments = ["--hidden", "4", "--epochs", "1", "--examples", "60", "--updates", "5", "--families", "diagonal"]
    counts = conjugate.main([*arguments, "--damping", "0.1", "--ranks", "40"])
    assert [(c.side, c.method, c.built) for c in counts] == [
        ("gradient", "plain", 0), ("normal", "plain", 0), ("gradient", "diagonal", 5), ("normal", "diagonal", 5),
        ("gradient", "rank 40", 40), ("normal", "rank 40", 40),
    ]  # fmt: skip
    assert counts[5].iterations < counts[1].iterations
    assert all(c.converged and c.iterations > 1 for c in counts)
    assert str(counts[1].iterations) in capsys.readouterr().out
