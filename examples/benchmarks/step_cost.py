"""Measure what a step of FishLeg costs, in steps of AdamW on the same model and batch.

    python examples/benchmarks/step_cost.py --models mlp cnn              # eager, beside Muon, SOAP and Shampoo
    python examples/benchmarks/step_cost.py --compile --json costs.json   # every model; takes about an hour
    python examples/benchmarks/step_cost.py --compile-time                # seconds until a compiled step runs

A step is all that trains on one batch: zero_grad, forward pass, backward pass, update. AdamW is torch's, eager and at
its defaults, as are all other methods but Shampoo (see _common.py). In each repetition every method in turn runs a
stretch of steps, right after a stretch of AdamW on the same batch, and its mean is divided by AdamW's. The table gives
the medians of these ratios.

FishLeg's steps are of three kinds: plain, statistics (of the Fisher are taken) and refresh (bases are renewed, too, and
λ moves). They are timed one by one, late enough in training for their schedule to be periodic, and "amortized" weights
the kinds as a period of the schedule does. Methods with a cadence of their own (SOAP, the original FishLeg) run whole
multiples of it.

Memory is the peak of a process of its own that makes a few steps, over AdamW's: the resident memory of all of it, what
compiling needs included; on a GPU, what torch has allocated. State is what is kept between steps, in bytes for each
parameter of the model, and over AdamW's. SOAP and Shampoo need the package pytorch_optimizer, or are left out.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from _common import METHODS, PROBLEMS, Batch, Contender, contender
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fishleg_func.schedule import CADENCE, is_due, is_refresh

MIN_REPS = 15
MAY_BE_SLOW, SLOW_SECONDS, SLOW_REPS = {"soap", "shampoo"}, 1.0, 5  # a step longer than this: only so many repetitions
STRETCH, STRETCH_SECONDS = (3, 10), 0.5  # steps in a row: between so many, about so long, then rounded up to a cadence
UNSUPPORTED = {("original", "transformer")}  # it trains nothing but a nested nn.Sequential


def kind(t: int, every: int) -> str:
    """Return the kind of FishLeg's step number t at the defaults, with so many steps between statistics."""
    return "plain" if not is_due(t, every, CADENCE) else "refresh" if is_refresh(t, CADENCE) else "statistics"


KINDS = ("plain", "statistics", "refresh")
STEADY = range(*[t for t in range(320 * CADENCE, 640 * CADENCE) if is_refresh(t, CADENCE)][:2])  # the schedule's period
TIMED = range(
    STEADY.start, STEADY.start + 2 * CADENCE
)  # FishLeg's stretch: some of every kind, as they follow each other


def shares(every: int) -> dict[str, float]:
    """Return how often each kind comes in a period of the schedule."""
    return {name: n / len(STEADY) for name, n in Counter(kind(t, every) for t in STEADY).items()}


@dataclass(frozen=True)
class Config:
    """What to run."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    reps: int
    threads: int
    device: str  # "cpu" or "cuda"
    original: Path | None  # a checkout of the original FishLeg
    memory: bool  # whether to measure it
    compile_time: bool  # whether to measure that, and nothing else
    json: Path | None


@dataclass(frozen=True)
class Cost:
    """What a method costs on a model."""

    method: str
    repetitions: int
    ratios: dict[str, float]  # seconds per step over AdamW's, medians: "amortized", and for FishLeg each kind
    quartiles: dict[str, tuple[float, float]]  # of the same ratios, over the repetitions
    state_bytes: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class ModelCosts:
    """What every method costs on a model."""

    model: str
    parameters: int
    adamw_seconds: float  # per step
    costs: tuple[Cost, ...]  # AdamW's first


@dataclass(frozen=True)
class CompileTime:
    """Seconds that a process spends on compiling: in its first step, and in all steps until every graph is there."""

    model: str
    graphs: int
    cold: tuple[float, float]  # with an empty cache
    warm: tuple[float, float]  # with the cache that such a process has left


def main(argv: Sequence[str] | None = None) -> list[ModelCosts] | list[CompileTime]:
    """Measure, print a table for each model, and write the JSON file.

    Args:
        argv: Command-line arguments; None takes those of the process.

    Returns:
        What was measured, for each model.
    """
    config = parse(argv)
    torch.set_num_threads(config.threads)
    measure, table = (compile_time, compile_table) if config.compile_time else (model_costs, cost_table)
    console, found = Console(), []
    for name in config.models:
        found.append(measure(name, config))
        console.print(table(found[-1]))
        if config.json is not None:  # after every model: a long run that is cut short leaves what it has
            about = {"torch": torch.__version__, "threads": config.threads, "device": config.device}
            config.json.write_text(json.dumps({**about, "models": [asdict(one) for one in found]}, indent=1) + "\n")
    return found


def parse(argv: Sequence[str] | None) -> Config:
    """Return the configuration of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(PROBLEMS), default=tuple(PROBLEMS), help="default: all")
    methods = tuple(name for name in METHODS if name != "adamw")
    parser.add_argument("--methods", nargs="+", choices=methods, help="default: all that are asked for and installed")
    parser.add_argument("--compile", action="store_true", help="add FishLeg compiled; takes minutes for each model")
    parser.add_argument("--original", type=Path, help="a checkout of github.com/mtkresearch/FishLeg, to add it")
    parser.add_argument("--reps", type=int, default=MIN_REPS, help=f"repetitions, at least {MIN_REPS} (the default)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; default: torch's choice"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--compile-time", action="store_true", help="measure the time that compiling takes, only")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    values = vars(parser.parse_args(argv))
    if values["reps"] < MIN_REPS or values["threads"] < 1:
        parser.error(f"--reps {values['reps']} must be >= {MIN_REPS}, and --threads {values['threads']} >= 1")
    compiled = values.pop("compile")
    if values["methods"] is None:
        absent = set() if importlib.util.find_spec("pytorch_optimizer") else {"soap", "shampoo"}
        absent |= set() if compiled else {"compiled"}
        values["methods"] = [m for m in methods if m not in absent and (m != "original" or values["original"])]
    elif compiled and "compiled" not in values["methods"]:
        values["methods"].append("compiled")
    if "original" in values["methods"] and values["original"] is None:
        parser.error("--methods original needs --original PATH, a checkout of github.com/mtkresearch/FishLeg")
    return Config(**values | {name: tuple(values[name]) for name in ("models", "methods")})


# The measurements


def model_costs(name: str, config: Config) -> ModelCosts:
    """Return what every method costs on the model of that name."""
    problem = PROBLEMS[name]
    methods = ("adamw", *(m for m in config.methods if (m, name) not in UNSUPPORTED))
    peaks = {m: in_new_process(peak_memory, m, name, config) for m in methods} if config.memory else {}
    torch.compiler.reset()  # torch gives up after so many graphs, those of other models included
    contenders = {m: contender(m, problem, problem.model(config.device), config.original) for m in methods}
    seconds = {m: warm_up(contenders[m], problem.batch(config.device)) for m in methods}
    steps = min(max(math.ceil(STRETCH_SECONDS / seconds["adamw"]), STRETCH[0]), STRETCH[1])
    slow = {m for m in MAY_BE_SLOW.intersection(methods) if seconds[m] > SLOW_SECONDS}
    reps = {m: min(SLOW_REPS, config.reps) if m in slow else config.reps for m in methods}
    units: list[float] = []
    ratios: dict[str, list[dict[str, float]]] = {m: [] for m in methods}
    for repetition in range(config.reps):
        batch = problem.batch(config.device)
        for m in methods:
            if repetition < reps[m]:
                units.append(stretch(contenders["adamw"], batch, steps)["amortized"])
                found = stretch(contenders[m], batch, 1 if m in slow else steps)
                ratios[m].append({key: value / units[-1] for key, value in found.items()})
    costs = tuple(summary(m, ratios[m], contenders[m].state_bytes(), peaks.get(m)) for m in methods)
    return ModelCosts(name, sum(p.numel() for p in problem.model("cpu").parameters()), median(units), costs)


def summary(method: str, ratios: Sequence[Mapping[str, float]], state_bytes: int, peak_bytes: int | None) -> Cost:
    """Return medians and quartiles over the repetitions."""
    columns = {key: [ratio[key] for ratio in ratios] for key in ratios[0]}
    middle = {key: median(values) for key, values in columns.items()}
    parts = {key: quantiles(values) for key, values in columns.items()}
    outer = {key: (low, high) for key, (low, _, high) in parts.items()}
    return Cost(method, len(ratios), middle, outer, state_bytes, peak_bytes)


def warm_up(contender: Contender, batch: Batch) -> float:
    """Make each kind of step at least once; return the mean seconds of all but the first."""
    return fmean([timed(contender.step, batch) for _ in range(contender.period + 2)][1:])


def stretch(contender: Contender, batch: Batch, steps: int) -> dict[str, float]:
    """Return the mean seconds of steps in a row, after one that does not count; of FishLeg's also those of each kind.

    Args:
        contender: What makes the steps.
        batch: What they train on.
        steps: How many, rounded up to whole periods of the contender; FishLeg makes its own number.

    Returns:
        Seconds per step, by name.
    """
    if contender.jump is not None:
        contender.jump(TIMED.start - 1)
    contender.step(*batch)
    if contender.jump is None or contender.every is None:
        whole = math.ceil(steps / contender.period) * contender.period
        return {"amortized": fmean(timed(contender.step, batch) for _ in range(whole))}
    every = contender.every()
    seconds: dict[str, list[float]] = {name: [] for name in shares(every)}
    for t in TIMED:
        seconds[kind(t, every)].append(timed(contender.step, batch))
    means = {name: fmean(values) for name, values in seconds.items()}
    return {"amortized": sum(share * means[name] for name, share in shares(every).items()), **means}


def timed(step: Callable[[Tensor, Tensor], object], batch: Batch) -> float:
    """Return the seconds of one step."""
    wait = torch.cuda.synchronize if batch[0].is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    step(*batch)
    wait()
    return time.perf_counter() - began


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(method: str, name: str, config: Config) -> int:
    """Return the peak bytes of this process after each kind of step."""
    torch.set_num_threads(config.threads)
    problem = PROBLEMS[name]
    model = problem.model(config.device)
    warm_up(contender(method, problem, model, config.original), problem.batch(config.device))
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux; getrusage counts there the parent process from before exec
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def compile_time(name: str, config: Config) -> CompileTime:
    """Return the time that compiling takes, with a cache that is empty and with one that is filled."""
    with tempfile.TemporaryDirectory() as cache:
        (graphs, *cold), (_, *warm) = (in_new_process(compile_seconds, name, config, cache) for _ in range(2))
    return CompileTime(name, graphs, tuple(cold), tuple(warm))


def compile_seconds(name: str, config: Config, cache: str) -> tuple[int, float, float]:
    """Return the number of graphs, and by how much the first step, and all, exceed the fastest steps of their kinds."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch.set_num_threads(config.threads)
    problem = PROBLEMS[name]
    compiled = contender("compiled", problem, problem.model(config.device))
    assert compiled.every is not None  # it is FishLeg
    steps = [timed(compiled.step, problem.batch(config.device)) for _ in range(4 * CADENCE)]  # each kind comes again
    kinds = [kind(t, compiled.every()) for t in range(len(steps))]
    usual = {name: min(seconds for k, seconds in zip(kinds, steps, strict=True) if k == name) for name in set(kinds)}
    excess = [seconds - usual[k] for k, seconds in zip(kinds, steps, strict=True)]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], excess[0], sum(excess)


# The tables


def cost_table(found: ModelCosts) -> Table:
    """Return the costs on one model."""
    title = f"{found.model}: {found.parameters:,} parameters, AdamW {1000 * found.adamw_seconds:.3g} ms"
    made = Table("method", title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("amortized", *KINDS, "reps", "memory", "B/param", "state"):
        made.add_column(name, justify="right", no_wrap=True)
    adamw = found.costs[0]
    for cost in found.costs:
        times = [f"{cost.ratios[name]:.2f}x" if name in cost.ratios else "" for name in ("amortized", *KINDS)]
        memory = "" if cost.peak_bytes is None else f"{cost.peak_bytes / adamw.peak_bytes:.2f}x"
        state = (f"{cost.state_bytes / found.parameters:.1f}", f"{cost.state_bytes / adamw.state_bytes:.2f}x")
        made.add_row(cost.method, *times, str(cost.repetitions), memory, *state)
    return made


def compile_table(found: CompileTime) -> Table:
    """Return the seconds of compiling one model's step."""
    made = Table("cache", title=f"{found.model}: {found.graphs} graphs, seconds of compiling", box=box.SIMPLE_HEAD)
    for name in ("first step", "all graphs"):
        made.add_column(name, justify="right")
    for name, seconds in (("cold", found.cold), ("warm", found.warm)):
        made.add_row(name, *(f"{part:.1f}" for part in seconds))
    return made


if __name__ == "__main__":
    main()
