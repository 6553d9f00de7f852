"""Train every architecture of ``zoo.py`` a few steps, eager and compiled, and print what came of it.

    python examples/architectures.py                       # the tiny ones
    python examples/architectures.py --whole               # and three as published
    python examples/architectures.py --only LSTM GRU
    python examples/architectures.py --markdown > table.md
    python examples/architectures.py --report --only "transformers GPT-2"

The loss is on one batch. The last column says whether ``torch.compile(step, fullgraph=True, backend="aot_eager")``
makes one graph of a step, or why it cannot: each architecture is compiled in a process of its own, since a failed trace
can leave torch unusable.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch._dynamo.utils
from zoo import CASES, WHOLE, Case

STEPS = 20
COMPILED_STEPS = 1  # the first has all that a step can have: an update of Q and a refresh of its bases
REASON = 160  # letters


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        name: As in the zoo.
        parameters: How many numbers are trained.
        layers: How many of its parameters have Q of each family, in words.
        before: Loss at the first step.
        after: Mean loss of the last three.
        plain_ms: Median CPU milliseconds of a step in which Q stands.
        learning_ms: Median CPU milliseconds of a step that updates Q.
        compiled: Whether the step compiles as one graph, or why not.
    """

    name: str
    parameters: int
    layers: str
    before: float
    after: float
    plain_ms: float
    learning_ms: float
    compiled: str


def make(name: str) -> Case:
    """Return a case of the zoo, always the same."""
    torch.manual_seed(0)
    return (CASES | WHOLE)[name]()


def families(report: object) -> str:
    """Count treatments in a report."""
    treatments = [row.treatment for row in report.rows]  # type: ignore[attr-defined]
    return ", ".join(f"{treatments.count(t)} {t}" for t in sorted(set(treatments), key=treatments.count, reverse=True))


def train(name: str, steps: int = STEPS) -> Row:
    """Train eagerly; the first half of the steps update Q, and the others do not."""
    case = make(name)
    learning = steps // 2
    step = case.step(update_aux_every=learning)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.process_time()
        losses.append(float(step(case.inputs, case.targets)))
        seconds.append(time.process_time() - start)
    trained = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    after = sum(losses[-3:]) / 3
    plain = statistics.median(seconds[learning + 1 :])
    return Row(
        name, trained, families(step.report()), losses[0], after, 1e3 * plain,
        1e3 * statistics.median(seconds[1:learning]), "",
    )  # fmt: skip


def compile_status(name: str) -> str:
    """Compile the first step of one case, and say whether that is one graph, how long it took, or why it failed."""
    torch.set_num_threads(1)
    case = make(name)
    step = torch.compile(case.step(), fullgraph=True, backend="aot_eager")
    start = time.process_time()
    try:
        losses = [step(case.inputs, case.targets) for _ in range(COMPILED_STEPS)]
    except Exception as error:  # whatever torch cannot compile: the reason is the result
        return f"no: {gist(error)}"
    counters, seconds = torch._dynamo.utils.counters, time.process_time() - start
    if counters["graph_break"] or not torch.stack(losses).isfinite().all():
        return f"no: {dict(counters['graph_break'])}, losses {losses}"
    return f"yes, {counters['stats']['unique_graphs']} graph in {seconds:.0f} s"


def gist(error: BaseException) -> str:
    """Return the first lines of an exception as one short line."""
    text = re.sub(r"\s+", " ", str(error).split("Developer debug context")[0].split("from user code")[0]).strip()
    text = re.sub(r"/\S+/", "", text).replace("|", "/")
    return f"{type(error).__name__}: {text[:REASON]}{'...' if len(text) > REASON else ''}"


def in_own_process(name: str) -> str:
    """Return the compile status, found in a process that ends after it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(compile_status, name).result()


HEAD = ("architecture", "parameters", "treatment of parameter tensors", "loss, first step", "last three",
        "plain step, CPU ms", "with update of Q, CPU ms", "fullgraph")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text."""
    losses, times = (f"{row.before:.3f}", f"{row.after:.3f}"), (f"{row.plain_ms:.0f}", f"{row.learning_ms:.0f}")
    return (row.name, f"{row.parameters:,}", row.layers, *losses, *times, row.compiled)


def markdown(rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for, and print it."""
    parser = argparse.ArgumentParser(description="Train every architecture a few steps, eager and compiled.")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=[*CASES, *WHOLE], metavar="NAME")
    parser.add_argument("--whole", action="store_true", help="also those as published")
    parser.add_argument("--no-compile", action="store_true", help="leave out compilation")
    parser.add_argument("--report", action="store_true", help="only print what is done with every parameter")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/architectures.md")
    config = parser.parse_args(arguments)
    if config.report:
        print(*(make(name).step().report() for name in config.only), sep="\n\n")
        return []
    rows = []
    for name in config.only + (list(WHOLE) if config.whole else []):
        row = train(name)
        status = "not tried" if config.no_compile or name in WHOLE else in_own_process(name)
        row = Row(**{**vars(row), "compiled": status})
        rows.append(row)
        if not config.markdown:
            print("  ".join(f"{h}: {c}" for h, c in zip(HEAD[1:], cells(row)[1:], strict=True)), f" {name}", flush=True)
    if config.markdown:
        print(markdown(rows))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
