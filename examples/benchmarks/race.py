"""Race FishLeg against other methods: the loss after a budget, and the steps and seconds to the loss of AdamW.

    python examples/benchmarks/race.py --task digits --methods fishleg adamw              # a minute
    python examples/benchmarks/race.py --task fashion-ae --json race.json --plot race.png # every method; takes hours
    python examples/benchmarks/race.py --task text --methods fishleg "fishleg damping=1e-3 u='momentum'" adamw

All methods start from the same parameters, see the same batches in the same order, and have their rate fall linearly
to zero over the budget. "fishleg" runs at its defaults. All others, and "fishleg-tuned", run over a grid of peak rates
with the first seed; while the best is at an end of the grid, the grid is extended there. The best by the final test
loss runs with the other seeds, too. "kfac" is FishLeg that never updates λ. A method may be followed by arguments of
fishlegify. Only training is timed, not evaluation, and a GPU is waited for only where that begins; with --workers 2 two
runs share the machine, a core each.

What is in the JSON file already is not run again, so that a race that was cut short goes on where it stopped.
"""

import argparse
import ast
import inspect
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import SHAMPOO, Contender, contender, make_fishleg
from _tasks import TASKS, Split, Task
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fishleg_func as ff

GRIDS = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3),
    "muon": (1e-3, 2e-3, 4e-3, 8e-3),
    "soap": (1e-3, 2e-3, 4e-3, 8e-3),
    "shampoo": (1e-3, 2e-3, 4e-3, 8e-3),
    "original": (1e-4, 1e-3, 1e-2, 1e-1),
    "kfac": (7.5e-3, 1.5e-2, 3e-2, 6e-2),
    "fishleg-tuned": (7.5e-3, 1.5e-2, 3e-2, 6e-2),
}
METHODS = ("fishleg", *GRIDS)
OWN = ("kfac", "fishleg", "fishleg-tuned")
DEFAULTS = {name: p.default for name, p in inspect.signature(ff.fishlegify).parameters.items()}
DEFAULT_RATE = DEFAULTS["lr"]
RIVAL = "adamw"  # whose final loss is to be reached
MOST_EXTENSIONS = 4  # of a grid
EVALUATIONS = 24  # of a run, evenly spaced
CHUNK = 2_000  # examples that are evaluated at once


@dataclass(frozen=True)
class Config:
    """What to run."""

    task: str
    methods: tuple[str, ...]
    budget: float  # epochs
    batch_size: int
    seeds: int
    workers: int
    threads: int  # of each worker
    device: str  # "cpu" or "cuda"
    original: Path | None
    json: Path | None
    plot: Path | None


@dataclass(frozen=True)
class Point:
    """Where a run stands."""

    step: int
    seconds: float  # of training so far
    train_loss: float  # on as many training examples as there are test examples
    test_loss: float
    accuracy: float | None = None  # on the test part


@dataclass(frozen=True)
class Run:
    """A method's training at one rate and from one seed."""

    method: str
    rate: float
    seed: int
    points: tuple[Point, ...]

    @property
    def final(self) -> float:
        """The test loss at the end; infinite where training broke down."""
        return self.points[-1].test_loss

    def reaching(self, loss: float) -> Point | None:
        """Return the first evaluation with a test loss at or below ``loss``."""
        return next((point for point in self.points if point.test_loss <= loss), None)


Key = tuple[str, float, int]  # method, rate, seed


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Run the race, print its table, draw its picture.

    Args:
        argv: Command-line arguments; None takes those of the process.

    Returns:
        Every run.
    """
    config = parse(argv)
    console = Console()
    runs = read(config)
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        while wanted := [key for method in config.methods for key in missing(method, runs, config.seeds)]:
            for done in as_completed([pool.submit(train, config, *key) for key in wanted]):
                try:
                    run = done.result()
                except Exception:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                runs[run.method, run.rate, run.seed] = run
                write(config, runs)
                line = f"{run.method} {run.rate:g}, seed {run.seed}: {run.final:.5g} in {run.points[-1].seconds:.1f} s"
                console.print(line, highlight=False, soft_wrap=True)
    console.print(table(config, runs))
    if config.plot is not None:
        picture(config, runs).savefig(config.plot, dpi=150)
    return list(runs.values())


def parse(argv: Sequence[str] | None) -> Config:
    """Return the configuration of a command line, with the task's usual budget and batch size filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--budget", type=float, help="epochs; default: depends on the task")
    parser.add_argument("--batch-size", type=int, help="default: depends on the task")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--original", type=Path, help="a checkout of github.com/mtkresearch/FishLeg")
    parser.add_argument("--json", type=Path, help="file of the runs: read where it exists, written after each")
    parser.add_argument("--plot", type=Path, help="file of the picture")
    values = vars(parser.parse_args(argv))
    task = TASKS[values["task"]]
    for name, usual in (("budget", task.epochs), ("batch_size", task.batch_size)):
        values[name] = usual if values[name] is None else values[name]
    if values["methods"] is None:
        without = () if values["original"] and values["task"] != "text" else ("original",)
        values["methods"] = [name for name in METHODS if name not in without]
    for method in values["methods"]:
        try:
            name, arguments = settings(method)
        except (ValueError, SyntaxError) as error:
            parser.error(f"--methods {method!r} must be a name and arguments such as u='momentum': {error}")
        if name not in METHODS:
            parser.error(f"--methods {method!r} must begin with one of {', '.join(METHODS)}")
        unknown = arguments.keys() - (DEFAULTS.keys() - {"lr"} if name in OWN else ())
        if unknown:
            parser.error(f"--methods {method!r}: {', '.join(unknown)} must be arguments of fishlegify other than lr")
        if name == "original" and values["original"] is None:
            parser.error("--methods original needs --original PATH, a checkout of github.com/mtkresearch/FishLeg")
        if name == "original" and values["task"] == "text":
            parser.error("--methods original trains nothing but a nested nn.Sequential, and not --task text")
    for name in ("budget", "batch_size", "seeds", "workers", "threads"):
        if not 0 < values[name] < math.inf:
            parser.error(f"--{name.replace('_', '-')} {values[name]} must be > 0 and finite")
    examples = len(task.load().train[0])
    if values["batch_size"] > examples or round(values["budget"] * (examples // values["batch_size"])) < 1:
        parser.error(f"--budget {values['budget']} must be at least one --batch-size of the {examples} examples")
    return Config(**values | {"methods": tuple(values["methods"])})


def settings(method: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a method and its arguments: ``"kfac damping=1e-3"`` to ``("kfac", {"damping": 1e-3})``."""
    name, *arguments = method.split()
    return name, {key: ast.literal_eval(value) for key, value in (a.split("=", 1) for a in arguments)}


# Which runs


def missing(method: str, runs: Mapping[Key, Run], seeds: int) -> list[Key]:
    """Return the runs of a method that can be started now: its grid's, those that extend it, or the best's seeds."""
    name, _ = settings(method)
    grid = GRIDS.get(name, (DEFAULT_RATE,))
    first = [(method, rate, 0) for rate in grid if (method, rate, 0) not in runs]
    if first:
        return first
    rate = best_rate(method, runs)
    tried = sorted(r for m, r, seed in runs if m == method and seed == 0)
    if name in GRIDS and len(tried) < len(grid) + MOST_EXTENSIONS and rate in (tried[0], tried[-1]):
        return [(method, rate / 2 if rate == tried[0] else rate * 2, 0)]
    return [(method, rate, seed) for seed in range(1, seeds) if (method, rate, seed) not in runs]


def best_rate(method: str, runs: Mapping[Key, Run]) -> float:
    """Return the rate with the lowest final test loss from the first seed."""
    finals = {run.rate: run.final for run in runs.values() if run.method == method and run.seed == 0}
    return min(finals, key=lambda rate: finals[rate])


def read(config: Config) -> dict[Key, Run]:
    """Return the runs of the file, if it is there and of the same race."""
    if config.json is None or not config.json.exists():
        return {}
    try:
        found = json.loads(config.json.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"{config.json} must be a file that a race has written ({error}); name another one") from error
    about = facts(config)
    others = [
        f"{name}={found.get(name)!r} instead of {value!r}" for name, value in about.items() if found.get(name) != value
    ]
    if others:
        raise SystemExit(f"{config.json} holds another race, with {', '.join(others)}; name another file, or delete it")
    points = [tuple(Point(**point) for point in run.pop("points")) for run in found["runs"]]
    made = [Run(**run, points=p) for run, p in zip(found["runs"], points, strict=True)]
    return {(run.method, run.rate, run.seed): run for run in made}


def write(config: Config, runs: Mapping[Key, Run]) -> None:
    """Write all runs to the file, if there is to be one."""
    if config.json is not None:
        beside = config.json.with_name(f"{config.json.name}.new")
        beside.write_text(json.dumps({**facts(config), "runs": [asdict(run) for run in runs.values()]}) + "\n")
        beside.replace(config.json)  # whole, whenever it is cut short


def facts(config: Config) -> dict[str, Any]:
    """Return what all runs of a file have in common."""
    names = ("task", "budget", "batch_size", "threads", "workers", "device")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    defaults = {name: value for name, value in DEFAULTS.items() if name not in ("model", "likelihood")}
    return {n: getattr(config, n) for n in names} | versions | {"fishleg": repr(defaults), "shampoo": repr(SHAMPOO)}


# One run


def train(config: Config, method: str, rate: float, seed: int) -> Run:
    """Train from the seed's start over the seed's batches, the rate falling linearly to zero over the budget."""
    torch.set_num_threads(config.threads)
    task = TASKS[config.task]
    split = task.load().to(config.device)
    inputs, targets = split.train
    if config.device == "cuda":  # a step of a twin, so that loading the libraries of a GPU is not timed
        enter(task, method, seed, config)[1].step(inputs[: config.batch_size], targets[: config.batch_size])
        torch.cuda.synchronize()
    model, racer = enter(task, method, seed, config)
    batches = len(inputs) // config.batch_size
    total = round(config.budget * batches)
    marks = {round(total * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    order = torch.Generator().manual_seed(seed)
    seconds, points = 0.0, [evaluate(task, model, split, 0, 0.0)]
    for step in range(total):
        if step % batches == 0:
            shuffled = torch.randperm(len(inputs), generator=order).to(config.device)
        chosen = shuffled[step % batches * config.batch_size :][: config.batch_size]
        batch = inputs[chosen], targets[chosen]
        racer.set_rate(rate * (1 - step / total))
        began = time.perf_counter()
        try:
            racer.step(*batch)
        except FloatingPointError:  # FishLeg refuses, or the original is lost
            return Run(method, rate, seed, (*points, Point(step, seconds, math.inf, math.inf)))
        if step + 1 in marks and config.device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        if step + 1 in marks:
            points.append(evaluate(task, model, split, step + 1, seconds))
            if not math.isfinite(points[-1].test_loss):
                return Run(method, rate, seed, (*points[:-1], Point(step + 1, seconds, math.inf, math.inf)))
    return Run(method, rate, seed, tuple(points))


def enter(task: Task, method: str, seed: int, config: Config) -> tuple[nn.Module, Contender]:
    """Return the seed's model, and the method ready to train it."""
    name, arguments = settings(method)
    problem = task.problem(seed)
    model = problem.make().to(config.device)
    if name == "kfac":
        arguments = {"update_aux_every": 0, **arguments}
    if name in OWN:
        return model, make_fishleg(problem, model, **arguments)
    return model, contender(name, problem, model, config.original)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: Split, step: int, seconds: float) -> Point:
    """Return where a run stands; the model is evaluated in ``eval`` mode."""
    model.eval()
    count = len(split.test[0])
    train, _ = losses(task, model, tuple(x[:count] for x in split.train))
    test, accuracy = losses(task, model, split.test)
    model.train()
    return Point(step, seconds, train, test, accuracy)


def losses(task: Task, model: nn.Module, examples: tuple[Tensor, Tensor]) -> tuple[float, float | None]:
    """Return the mean loss of examples, and their accuracy if they have classes."""
    loss, right = 0.0, 0.0
    for inputs, targets in zip(*(x.split(CHUNK) for x in examples), strict=True):
        outputs = model(inputs)
        loss += task.loss(outputs, targets).item() * len(inputs)
        right += (outputs.argmax(-1) == targets).float().mean().item() * len(inputs) if task.classifies else 0.0
    count = len(examples[0])
    return loss / count, right / count if task.classifies else None


# The results


def table(config: Config, runs: Mapping[Key, Run]) -> Table:
    """Return a row for each method at its best rate: means over the seeds, and the spread of the test loss.

    The loss to reach is the rival's from the same seed.
    """
    task = TASKS[config.task]
    title = f"{task.title}: {config.budget:g} epochs, batch {config.batch_size}"
    made = Table("method", title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    names = ["rate", "train", "test", "±", *(["right"] if task.classifies else []), "s"]
    for name in [*names, f"steps to\n{RIVAL}", f"s to\n{RIVAL}"]:
        made.add_column(name, justify="right", no_wrap=True)
    rivals = chosen(RIVAL, runs, config.seeds) if RIVAL in config.methods else []
    goals = {run.seed: run.final for run in rivals if math.isfinite(run.final)}
    for method in config.methods:
        found = chosen(method, runs, config.seeds)
        ends = [run.points[-1] for run in found]
        finals = [run.final for run in found]
        cells = [f"{found[0].rate:g}", f"{fmean(p.train_loss for p in ends):.5g}", f"{fmean(finals):.5g}"]
        cells.append(f"{(max(finals) - min(finals)) / 2:.2g}" if all(map(math.isfinite, finals)) else "")
        if task.classifies:
            right = [p.accuracy for p in ends]
            cells.append("" if None in right else f"{100 * fmean(right):.2f}%")
        cells.append(f"{fmean(p.seconds for p in ends):.1f}")
        reached = [run.reaching(goals[run.seed]) for run in found if run.seed in goals]
        if not reached:
            cells += [""] * 2
        elif None in reached:
            cells += ["never"] * 2
        else:
            cells.append(f"{fmean(p.step for p in reached) / max(p.step for p in ends):.0%}")
            cells.append(f"{fmean(p.seconds for p in reached):.1f}")
        made.add_row(method, *cells)
    return made


def chosen(method: str, runs: Mapping[Key, Run], seeds: int) -> list[Run]:
    """Return the runs of a method at its best rate, one for each seed."""
    rate = best_rate(method, runs)
    return [run for run in runs.values() if (run.method, run.rate) == (method, rate) and run.seed < seeds]


def picture(config: Config, runs: Mapping[Key, Run]) -> Figure:
    """Return the test losses against steps and seconds, a line for each method: means over the seeds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lowest, highest = math.inf, -math.inf
    for method in config.methods:
        found = [run for run in chosen(method, runs, config.seeds) if math.isfinite(run.final)]
        if not found:
            continue
        columns = list(zip(*(run.points for run in found), strict=True))
        loss = [fmean(p.test_loss for p in column) for column in columns]
        lowest, highest = min(lowest, *loss), max(highest, loss[len(loss) // 6])
        for axes, unit in ((left, "step"), (right, "seconds")):
            places = [fmean(getattr(p, unit) for p in column) for column in columns]
            axes.plot(places, loss, label=f"{method}, {found[0].rate:g}")
    for axes, unit in ((left, "step"), (right, "seconds of training")):
        axes.set_xlabel(unit)
        if lowest < highest:  # unless nothing was drawn
            axes.set_ylim(lowest - 0.05 * (highest - lowest), highest)
        axes.grid(alpha=0.3)
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("test loss")
    if left.lines:
        left.legend()
    figure.suptitle(TASKS[config.task].title)
    return figure


if __name__ == "__main__":
    main()
