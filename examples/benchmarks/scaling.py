"""Measure how the cost and the memory of a step grow with width, depth, batch, classes and vocabulary; fit exponents.

    python examples/benchmarks/scaling.py --quick --threads 1       # small sizes, where overheads and caches still show
    python examples/benchmarks/scaling.py --json scaling.json       # all sizes; the largest take minutes and gigabytes
    python examples/benchmarks/scaling.py --sweeps width classes    # some of them

Every size is measured in a process of its own: the state that FishLeg keeps, the peak of memory in a first step (of the
process, from /proc, so on Linux only; with CUDA, of its allocator), the median time of each class of steps (plain;
statistics: of the Fisher, too; refresh: bases and λ), their mean over a period of the steady schedule, and a step of
AdamW.
Exponents are slopes of least-squares lines through the logarithms, over the upper half of the sizes. Up to a tolerance
for noise they must not exceed what theory allows: for a layer [m, n], rows (m² + n²) in time, m³ + n³ where factors are
multiplied or factorized, m² + n² in memory, and nothing above linear in depth, batch, classes and vocabulary.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, takewhile
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression, median

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from step_cost import STEADY, kind
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.schedule import spacing

FEATURES, CLASSES, BATCH, BAG = 64, 10, 64, 16  # what does not grow in a sweep; BAG: words in an example
WIDTH = 256  # of the hidden layers where depth or batch grows
MAX_DIM = 4096  # longest side of a dense factor of Q, the library's default
RATE = 1e-5  # of learning: the model stays about where it started, so that no number becomes subnormal and slow
TOLERANCE = 0.15  # of an exponent, for noise
FAR_BELOW = 0.1  # largest part of a vocabulary x vocabulary matrix that the peak of memory may be
TIMES, BYTES = ("AdamW", "plain", "statistics", "refresh", "amortized"), ("state", "peak")  # what is measured
LINEAR = dict.fromkeys((*TIMES[1:], *BYTES), 1)
SQUARE = {"plain": 2, "statistics": 2, "refresh": 3, "amortized": 3, "state": 2, "peak": 2}
Problem = tuple[nn.Module, Tensor, Tensor]  # model, inputs, targets
Fits = dict[str, "Fit"]  # by quantity


@dataclass(frozen=True)
class Sweep:
    """What grows, and how fast theory lets the cost grow with it."""

    title: str
    build: Callable[[int], Problem]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    allowed: Mapping[str, int]  # exponent, by quantity
    quick_max_dim: int = MAX_DIM


@dataclass(frozen=True)
class Config:
    """How to measure."""

    quick: bool
    threads: int
    reps: int
    device: str


@dataclass(frozen=True)
class Fit:
    """How one quantity grows in one sweep."""

    sizes: tuple[int, ...]
    values: tuple[float, ...]  # seconds or bytes, by size
    exponent: float  # over the upper half of the sizes
    allowed: int | None  # None for AdamW, which is there for comparison
    verdict: str  # PASS, FAIL or nothing


def mlp(widths: Sequence[int], batch: int = BATCH) -> Problem:
    """Return a classifier without biases, each of which makes a side one longer: at 4096 too long for one block."""
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))


def bag_of_words(words: int) -> Problem:
    """Return a classifier of bags of words, by the mean (the pool) of the vectors of their words."""
    layers = nn.Embedding(words, FEATURES), nn.AvgPool2d((BAG, 1)), nn.Flatten(), nn.Linear(FEATURES, CLASSES)
    return nn.Sequential(*layers), torch.randint(words, (BATCH, BAG)), torch.randint(CLASSES, (BATCH,))


SWEEPS = {
    "width": Sweep(
        f"width of two hidden layers, batch {BATCH}", lambda size: mlp((FEATURES, size, size, CLASSES)),
        (256, 512, 1024, 2048, 4096), (64, 128, 256, 512, 1024), SQUARE,
    ),
    "depth": Sweep(
        f"number of hidden layers of width {WIDTH}, batch {BATCH}",
        lambda size: mlp((FEATURES, *[WIDTH] * size, CLASSES)), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16), LINEAR,
    ),
    "batch": Sweep(
        f"batch, two hidden layers of width {WIDTH}", lambda size: mlp((FEATURES, WIDTH, WIDTH, CLASSES), size),
        (16, 32, 64, 128, 256, 512, 1024, 2048), (16, 32, 128, 512, 2048), LINEAR | {"state": 0},
    ),
    "classes": Sweep(
        f"number of classes of a head on {FEATURES} features, batch {BATCH}",
        lambda size: mlp((FEATURES, FEATURES, size)),
        (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 50_000), (256, 512, 1024, 2048, 4096), LINEAR,
        quick_max_dim=256,  # the upper half has sides longer than a block, as it has with all sizes
    ),
    "vocabulary": Sweep(
        f"number of words of an embedding in {FEATURES} features, {BATCH} bags of {BAG}", bag_of_words,
        (1_000, 2_000, 5_000, 10_000, 20_000, 50_000), (1_000, 2_000, 5_000, 20_000, 50_000), LINEAR,
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Fits]:
    """Run the sweeps, print a table of each, write the numbers and the picture, and return the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=tuple(SWEEPS), default=tuple(SWEEPS))
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--reps", type=int, default=7, help="timed steps; of the slow classes half, but at least 3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--picture", default="scaling.png", help="file of the picture; none for no picture")
    args = parser.parse_args(argv)
    if min(args.threads, args.reps) < 1:
        parser.error(f"--threads {args.threads} and --reps {args.reps} must be >= 1")
    config, console = Config(args.quick, args.threads, args.reps, args.device), Console(width=120)
    results: dict[str, Fits] = {}
    for name in args.sweeps:
        results[name] = run(name, config, console)
        console.print(table(name, results[name]))
        if name == "vocabulary" and results[name]["peak"].sizes:
            console.print(square_check(results[name]["peak"]), highlight=False, soft_wrap=True)
        if args.json is not None:  # after every sweep, so that an interrupted run leaves its numbers
            found = {"torch": torch.__version__, **asdict(config), "sweeps": results}
            args.json.write_text(json.dumps(found, indent=1, default=asdict))
    if args.picture not in ("", "none"):
        picture(results).savefig(args.picture, dpi=150)
        console.print(f"Picture: {args.picture}", highlight=False, soft_wrap=True)
    verdicts = Counter(found.verdict for fits in results.values() for found in fits.values() if found.verdict)
    console.print(f"{verdicts['PASS']} of {verdicts.total()} exponents are within what theory allows.", highlight=False)
    return results


def run(name: str, config: Config, console: Console) -> Fits:
    """Measure every size of a sweep; one whose process dies, for want of memory say, ends it."""
    sweep, measured = SWEEPS[name], {}
    for size in sweep.quick if config.quick else sweep.sizes:
        try:  # a process that starts from nothing, so that its peak of memory is that of one size
            with console.status(f"{name} {size:,}"), ProcessPoolExecutor(1, get_context("spawn")) as process:
                measured[size] = process.submit(measure, name, size, config).result()
        except BrokenProcessPool:
            console.print(f"{name} {size:,}: the process died; this and larger sizes are left out", highlight=False)
            break
    values = {key: tuple(found[key] for found in measured.values()) for key in (*TIMES, *BYTES)}
    return {key: fit(tuple(measured), numbers, sweep.allowed.get(key)) for key, numbers in values.items()}


def measure(name: str, size: int, config: Config) -> dict[str, float]:
    """Return the seconds and bytes of one size, by quantity; the peak is without that of a tiny problem."""
    torch.set_num_threads(config.threads)
    make_fishleg("width", 2, config)[0]()  # loads what is loaded late
    before = peak_bytes(config.device)
    call, step = make_fishleg(name, size, config)
    call()  # a refresh step that also checks the captured gradients: no later one should take more memory
    found: dict[str, float] = {"state": sum(row.state_bytes for row in step.report().rows)}
    found["peak"] = max(peak_bytes(config.device) - before, found["state"])  # of little, the heap may have had room
    schedule = Counter(kind(t, every(step)) for t in STEADY)
    for wanted in schedule:
        reps = config.reps if wanted == "plain" else max(3, config.reps // 2)
        found[wanted] = step_seconds(call, step, wanted, reps, config.device)
    found["amortized"] = sum(found[wanted] * times for wanted, times in schedule.items()) / schedule.total()
    call = make_adamw(name, size, config)
    found["AdamW"] = median([timed(call, config.device) for _ in range(2 + config.reps)][2:])
    return found


def peak_bytes(device: str) -> int:
    """Return the most memory held so far; ``ru_maxrss`` would start from what the parent process held."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def problem(name: str, size: int, device: str) -> Problem:
    """Return the problem of one size, always the same, on a device."""
    torch.manual_seed(0)
    model, inputs, targets = SWEEPS[name].build(size)
    return model.to(device), inputs.to(device), targets.to(device)


def make_fishleg(name: str, size: int, config: Config) -> tuple[Callable[[], object], ff.FishLegStep]:
    """Return a call of FishLeg's step on the problem's batch, and the step."""
    model, inputs, targets = problem(name, size, config.device)
    q = partial(ff.families.KFAC, max_dim=SWEEPS[name].quick_max_dim if config.quick else MAX_DIM)
    step = ff.fishlegify(model, ff.likelihoods.Categorical(), lr=RATE, q=q)
    return lambda: step(inputs, targets), step


def make_adamw(name: str, size: int, config: Config) -> Callable[[], object]:
    """Return a training step of AdamW on the problem's batch."""
    model, inputs, targets = problem(name, size, config.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def call() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return call


def every(step: ff.FishLegStep) -> int:
    """Return the steps between statistics, which are fewer for small batches."""
    return spacing(step.live_state()["rows"])


def step_seconds(call: Callable[[], object], step: ff.FishLegStep, wanted: str, reps: int, device: str) -> float:
    """Return the median seconds of a class of steps; a step after each setting of ``t`` is not timed."""
    kinds = {t: kind(t, every(step)) for t in range(STEADY.start - 1, STEADY.stop)}
    first = next(t for t in STEADY if kinds[t] == wanted and kinds[t - 1] != "refresh")
    seconds: list[float] = []
    while len(seconds) < reps:
        step.load_state_dict({**step.state_dict(), "t": first - 1})
        call()
        for _ in takewhile(lambda t: kinds[t] == wanted, range(first, first + reps - len(seconds))):
            seconds.append(timed(call, device))
    return median(seconds)


def timed(call: Callable[[], object], device: str) -> float:
    """Return the seconds of a call."""
    wait = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def fit(sizes: tuple[int, ...], values: tuple[float, ...], allowed: int | None) -> Fit:
    """Fit the exponent of the upper half of the sizes, NaN (and FAIL) for a single one, and judge it."""
    x, y = ([math.log(number) for number in numbers[len(numbers) // 2 :]] for numbers in (sizes, values))
    exponent = linear_regression(x, y).slope if len(x) > 1 else math.nan
    verdict = "" if allowed is None else "PASS" if exponent <= allowed + TOLERANCE else "FAIL"
    return Fit(sizes, values, exponent, allowed, verdict)


def table(name: str, fits: Fits) -> Table:
    """Return what was measured in a sweep, with the exponents."""
    made = Table("", title=f"Growing {SWEEPS[name].title}")
    for heading in (*(f"{size:,}" for size in fits["peak"].sizes), "exponent", "allowed", ""):
        made.add_column(heading, justify="right")
    for key, found in fits.items():
        unit, factor = ("ms", 1e3) if key in TIMES else ("MB", 1e-6)
        values = [f"{factor * value:,.{2 if factor * value < 100 else 0}f}" for value in found.values]
        allowed = f"<= {found.allowed}" if found.verdict else ""
        made.add_row(f"{key}, {unit}", *values, f"{found.exponent:.2f}", allowed, found.verdict)
    return made


def square_check(peak: Fit) -> str:
    """Return how the peak of memory at the largest size compares with a square matrix of that size."""
    size, value = peak.sizes[-1], peak.values[-1]
    square = 4 * size**2
    verdict = "PASS" if value <= FAR_BELOW * square else "FAIL"
    share = f"{100 * value / square:.2f}% of the {square / 1e9:.2f} GB of a matrix {size:,} x {size:,}"
    return f"{verdict}: the peak {value / 1e6:,.1f} MB is {share}, and must be <= {100 * FAR_BELOW:.0f}%"


def picture(results: Mapping[str, Fits]) -> Figure:
    """Return times (left) and bytes (right) of each sweep on logarithmic axes, with the exponents in the legends."""
    figure = Figure(figsize=(12, 4.2 * len(results)), layout="constrained")
    for (name, fits), row in zip(results.items(), figure.subplots(len(results), 2, squeeze=False), strict=True):
        for axes, keys, unit in zip(row, (TIMES, BYTES), ("seconds", "bytes"), strict=True):
            for key in keys:
                found = fits[key]
                limit = f" (<= {found.allowed}: {found.verdict})" if found.verdict else ""
                axes.loglog(found.sizes, found.values, marker="o", label=f"{key}: {found.exponent:.2f}{limit}")
            axes.set(xlabel=name, ylabel=unit)
            axes.legend(title="exponent", fontsize="small")
            axes.grid(which="both", alpha=0.3)
            axes.set_xticks([], minor=True)
            axes.set_xticks(found.sizes, [f"{size:,}" for size in found.sizes], fontsize="small")
        row[0].set_title(f"Growing {SWEEPS[name].title}", loc="left", fontsize="medium")
    return figure


if __name__ == "__main__":
    main()
