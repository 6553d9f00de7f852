"""Profile FishLeg's step on the autoencoder: where the time goes, beside the fewest seconds its operations can take.

    python examples/benchmarks/profile_step.py                # batch 100
    python examples/benchmarks/profile_step.py --model ae500 --rows 20

The floor of a step is the number of floating-point operations in its matrix products, counted while it runs, over the
rate of the machine, measured in the same run as the best of products of square matrices. The table is of one amortized
step: a plain one (there are none with batches of less than 16 rows), one with statistics and one with a refresh, each
counted as often as the schedule has it.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

import torch
from _common import PROBLEMS, Contender, contender
from rich import box
from rich.console import Console
from rich.table import Table
from step_cost import TIMED, kind, shares, timed
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, print two tables, and return the ratio of seconds to the floor for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PROBLEMS), default="ae100")
    parser.add_argument("--rows", type=int, default=14, help="operations in the table; default: %(default)s")
    parser.add_argument("--reps", type=int, default=15, help="of every kind of step; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's choice")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    problem = PROBLEMS[args.model]
    batch = problem.batch("cpu")
    methods = {name: contender(name, problem, problem.model("cpu")) for name in ("adamw", "fishleg")}
    for method in methods.values():
        for _ in range(4):
            method.step(*batch)
    of_kind = shares(every(methods["fishleg"]))
    seconds: dict[str, list[float]] = {name: [] for name in ("AdamW", *of_kind)}
    rates = []
    for _ in range(args.reps):  # interleaved, so that all see the same machine
        rates.append(matmul_rate())
        seconds["AdamW"].append(timed(methods["adamw"].step, batch))
        for name in of_kind:
            ready(methods["fishleg"], name, batch)
            seconds[name].append(timed(methods["fishleg"].step, batch))
    rate, middle = median(rates), {name: median(values) for name, values in seconds.items()}
    flops = {"AdamW": count(methods["adamw"], batch)}
    for name in of_kind:
        ready(methods["fishleg"], name, batch)
        flops[name] = count(methods["fishleg"], batch)
    for found in (middle, flops):
        found["amortized"] = sum(share * found[name] for name, share in of_kind.items())
    console = Console(width=120)
    console.print(f"{args.model}, {args.threads} threads; products of square matrices run at {rate / 1e9:.0f} GFLOP/s")
    console.print(floor_table(middle, flops, rate))
    console.print(profile_table(methods["fishleg"], batch, args.rows))
    return {name: middle[name] * rate / flops[name] for name in middle}


def every(fishleg: Contender) -> int:
    """Return FishLeg's steps between statistics."""
    assert fishleg.every is not None
    return fishleg.every()


def ready(fishleg: Contender, name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Bring FishLeg to just before a step of a kind."""
    assert fishleg.jump is not None
    spacing = every(fishleg)
    fishleg.jump(next(t for t in TIMED if kind(t, spacing) == name) - 1)
    fishleg.step(*batch)


def matmul_rate(size: int = 1000, reps: int = 3) -> float:
    """Return the floating-point operations per second of the best of a few products of square matrices."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    best = float("inf")
    for _ in range(reps):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def count(method: Contender, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the floating-point operations in the products of one step."""
    in_place = {torch.ops.aten.addmm_: product_flops}  # which torch does not count by itself
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        method.step(*batch)
    return float(counted.get_total_flops())


def product_flops(_: Sequence[int], a: Sequence[int], b: Sequence[int], **__: object) -> int:
    """Return the floating-point operations of ``addmm_``, from the shapes of its arguments."""
    return 2 * a[0] * a[1] * b[1]


def floor_table(seconds: dict[str, float], flops: dict[str, float], rate: float) -> Table:
    """Return the time of each kind of step beside the floor."""
    made = Table("step", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("ms", "over AdamW", "GFLOP", "floor, ms", "over floor"):
        made.add_column(name, justify="right")
    for name, value in seconds.items():
        floor = flops[name] / rate
        ratio = f"{value / seconds['AdamW']:.2f}x"
        made.add_row(name, f"{1e3 * value:.1f}", ratio, f"{flops[name] / 1e9:.2f}", f"{1e3 * floor:.1f}",
                     f"{value / floor:.2f}x")  # fmt: skip
    return made


def profile_table(fishleg: Contender, batch: tuple[torch.Tensor, torch.Tensor], rows: int) -> Table:
    """Return where the processor's time goes in an amortized step, by torch's operations."""
    spent, calls = Counter[str](), Counter[str]()
    for name, share in shares(every(fishleg)).items():
        for _ in range(3):
            ready(fishleg, name, batch)
            with profile(activities=[ProfilerActivity.CPU]) as found:
                fishleg.step(*batch)
            for event in found.key_averages():
                spent[event.key] += share * event.self_cpu_time_total / 3e3
                calls[event.key] += share * event.count / 3
    made = Table("operation (torch.profiler)", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("self CPU, ms", "share", "calls"):
        made.add_column(name, justify="right")
    for key, value in spent.most_common(rows):
        made.add_row(key, f"{value:.2f}", f"{value / spent.total():.1%}", f"{calls[key]:.1f}")
    made.add_row("all", f"{spent.total():.2f}", "100.0%", f"{calls.total():.1f}")
    return made


if __name__ == "__main__":
    main()
