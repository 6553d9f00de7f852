"""Train a deep autoencoder with FishLeg and with AdamW, and compare them at equal epochs and at equal seconds.

    python examples/autoencoder.py                         # digits of scikit-learn, about a minute
    python examples/autoencoder.py --data fashion-mnist --epochs 5

Every method starts from the same parameters, sees the same batches in the same order, and has its rate fall linearly to
zero over its budget. AdamW runs at several rates, for as many epochs as FishLeg and again for as many seconds; the best
rate by final test loss counts, in each case. Only training is timed, not evaluation.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import data
import torch
from einops import rearrange
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fishleg_func as ff

TrainStep = Callable[[Tensor, float], Tensor]  # (batch, rate) -> loss of that batch before the update


@dataclass(frozen=True)
class Problem:
    """A data set's autoencoder and its usual budget."""

    encoder: tuple[int, ...]  # widths from the image to the code; the decoder is its mirror image
    epochs: int


PROBLEMS = {
    "digits": Problem((64, 512, 256, 128, 30), 30),
    "fashion-mnist": Problem((784, 1000, 500, 250, 30), 5),
    "mnist": Problem((784, 1000, 500, 250, 30), 5),
    "curves": Problem((784, 400, 200, 100, 50, 25, 6), 10),
}
ADAMW_RATES = (3e-4, 1e-3, 3e-3)
SHOWN = 16  # test images in the picture
FISHLEG_RATE = 3e-2  # the library's default


@dataclass(frozen=True)
class Config:
    """What to run."""

    data: str
    data_dir: Path | None
    optimizer: str  # "fishleg", "adamw" or "both"
    epochs: int
    batch_size: int
    seed: int
    compile: bool
    plot: Path | None  # None: no picture
    lr: float  # FishLeg's
    adamw_lr: tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """How to train."""

    name: str
    make: Callable[[nn.Module, bool], TrainStep]  # (model, whether to compile) -> its training step
    rate: float  # at the start; it falls linearly to zero over the budget
    epochs: int = 0
    seconds: float = 0.0  # of training; where given, the budget instead of epochs


@dataclass(frozen=True)
class Point:
    """Where a run stands after an epoch."""

    epoch: int
    train_loss: float  # on as many training images as there are test images
    test_loss: float
    seconds: float  # spent on training so far


@dataclass(frozen=True)
class Run:
    """What training came to."""

    method: Method
    points: tuple[Point, ...]  # epochs 0, 1, ...
    reconstructions: Tensor  # of the first test images, [10, pixels]

    @property
    def last(self) -> Point:
        """Where it ended."""
        return self.points[-1]


@dataclass(frozen=True)
class Results:
    """All runs of one call."""

    images: data.ImageSet
    fishleg: Run | None = None
    adamw: tuple[Run, ...] = ()  # one for each rate
    longer: tuple[Run, ...] = ()  # AdamW again at each rate, for as many seconds as FishLeg took

    @property
    def best_adamw(self) -> Run | None:
        """The AdamW run with the lowest final test loss."""
        return best(self.adamw)

    @property
    def equal_seconds(self) -> Run | None:
        """The longer AdamW run with the lowest final test loss."""
        return best(self.longer)

    @property
    def shown(self) -> tuple[Run, ...]:
        """The runs that the table and the picture compare."""
        return tuple(run for run in (self.fishleg, self.best_adamw, self.equal_seconds) if run is not None)


def best(runs: Sequence[Run]) -> Run | None:
    """Return the run with the lowest final test loss, of those that are finite where any is."""
    finite = [run for run in runs if math.isfinite(run.last.test_loss)]
    return min(finite or runs, key=lambda run: run.last.test_loss, default=None)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the comparison, print its table and its outcome, and draw its picture.

    Args:
        argv: Command-line arguments; None takes those of the process.

    Returns:
        Every run with its losses and seconds.
    """
    config = parse(argv)
    console = Console()
    results = compare(config, data.load(config.data, config.data_dir), console)
    console.print(table(results))
    if config.plot is not None:
        picture(results).savefig(config.plot, dpi=150)
        console.print(f"Picture: {config.plot}", highlight=False, soft_wrap=True)
    console.print(verdict(results), highlight=False, soft_wrap=True)
    return results


def parse(argv: Sequence[str] | None) -> Config:
    """Return the configuration of a command line, with the defaults of its data set filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(PROBLEMS), default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder of the idx files of mnist or fashion-mnist")
    parser.add_argument("--optimizer", choices=("fishleg", "adamw", "both"), default="both")
    parser.add_argument("--epochs", type=int, help="default: depends on the data")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the initialization and of the order of the images")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; its time counts as training time")
    parser.add_argument("--plot", default="autoencoder.png", help="file of the picture; none for no picture")
    parser.add_argument("--lr", type=float, default=FISHLEG_RATE, help="FishLeg's rate (default: %(default)s)")
    parser.add_argument("--adamw-lr", type=float, nargs="+", default=ADAMW_RATES, help="AdamW's rates to try")
    values = vars(parser.parse_args(argv))
    if values["epochs"] is None:
        values["epochs"] = PROBLEMS[values["data"]].epochs
    numbers = {name: values[name] for name in ("epochs", "batch_size", "lr")} | {"adamw_lr": min(values["adamw_lr"])}
    wrong = [f"--{name.replace('_', '-')} {value}" for name, value in numbers.items() if not value > 0]
    if wrong:
        parser.error(f"{', '.join(wrong)} must be > 0")
    values["plot"] = None if values["plot"] in ("", "none") else Path(values["plot"])
    values["adamw_lr"] = tuple(values["adamw_lr"])
    return Config(**values)


def autoencoder(problem: Problem, seed: int) -> nn.Sequential:
    """Build the network: linear layers with a ReLU after each but those of the code and of the output.

    Args:
        problem: Gives the widths.
        seed: Seed of the initialization.

    Returns:
        A module that takes images ``[batch, pixels]`` to the logits of their pixels.
    """
    torch.manual_seed(seed)
    widths = problem.encoder + problem.encoder[-2::-1]
    linear = (len(problem.encoder) - 2, len(widths) - 2)  # the layers of the code and of the output
    layers: list[nn.Module] = []
    for index, (n, m) in enumerate(pairwise(widths)):
        layers += [nn.Linear(n, m)] if index in linear else [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers)


def bernoulli_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Return the Bernoulli loss of ``[batch, pixels]`` logits: summed over pixels, mean over images."""
    return nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def make_fishleg(model: nn.Module, compiled: bool) -> TrainStep:
    """Return FishLeg's training step for ``model``."""
    step = ff.fishlegify(model, ff.likelihoods.Bernoulli())
    call = torch.compile(step, fullgraph=True) if compiled else step

    def train_step(batch: Tensor, rate: float) -> Tensor:
        step.hyper.lr.fill_(rate)
        return call(batch, batch)

    return train_step


def make_adamw(model: nn.Module, compiled: bool) -> TrainStep:
    """Return AdamW's training step for ``model``."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    call = torch.compile(model, fullgraph=True) if compiled else model

    def train_step(batch: Tensor, rate: float) -> Tensor:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = bernoulli_loss(call(batch), batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train_step


def compare(config: Config, images: data.ImageSet, console: Console) -> Results:
    """Train with every method.

    Args:
        config: What to run.
        images: What to train on.
        console: Where to show progress.

    Returns:
        The runs.
    """
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    adamw = [Method(f"AdamW {rate:g}", make_adamw, rate, config.epochs) for rate in config.adamw_lr]
    fishleg = Method("FishLeg", make_fishleg, config.lr, config.epochs)
    results = Results(images)
    with Progress(*columns, TextColumn("{task.fields[status]}"), console=console) as progress:
        if config.optimizer != "fishleg":
            results = replace(results, adamw=tuple(train(config, images, method, progress) for method in adamw))
        if config.optimizer != "adamw":
            results = replace(results, fishleg=train(config, images, fishleg, progress))
        if config.optimizer == "both":
            seconds = results.fishleg.last.seconds
            longer = [replace(method, name=f"{method.name}, equal seconds", seconds=seconds) for method in adamw]
            results = replace(results, longer=tuple(train(config, images, method, progress) for method in longer))
    return results


def train(config: Config, images: data.ImageSet, method: Method, progress: Progress) -> Run:
    """Train one autoencoder from the seed's start, over the seed's batches.

    Args:
        config: Gives the problem, the batch size and the seed.
        images: What to train on.
        method: How to train.
        progress: Where to show progress.

    Returns:
        The run.

    Raises:
        ValueError: If there are fewer images than a batch holds.
    """
    batches = len(images.train) // config.batch_size  # the images left over wait for another epoch's order
    if batches == 0:
        raise ValueError(f"--batch-size {config.batch_size} must be <= {len(images.train)}, the training images")
    model = autoencoder(PROBLEMS[config.data], config.seed)
    train_step = method.make(model, config.compile)
    order = torch.Generator().manual_seed(config.seed)
    task = progress.add_task(method.name, total=1.0, status="")
    seconds, step, spent = 0.0, 0, 0.0  # spent: the part of the budget that is
    points = [Point(0, *evaluate(model, images), seconds)]
    while spent < 1:
        shuffled = torch.randperm(len(images.train), generator=order)
        for chosen in shuffled.split(config.batch_size)[:batches]:
            if spent >= 1:
                break
            began = time.perf_counter()
            train_step(images.train[chosen], method.rate * (1 - spent))
            seconds += time.perf_counter() - began
            step += 1
            spent = seconds / method.seconds if method.seconds else step / (method.epochs * batches)
            progress.update(task, completed=min(spent, 1.0))
        points.append(Point(len(points), *evaluate(model, images), seconds))
        progress.update(task, status=f"epoch {len(points) - 1}, test loss {points[-1].test_loss:.2f}")
    with torch.no_grad():
        return Run(method, tuple(points), model(images.test[:SHOWN]).sigmoid())


@torch.no_grad()
def evaluate(model: nn.Module, images: data.ImageSet) -> tuple[float, float]:
    """Return the training loss (on as many images as there are test images) and the test loss."""
    train, test = images.train[: len(images.test)], images.test
    return bernoulli_loss(model(train), train).item(), bernoulli_loss(model(test), test).item()


def table(results: Results) -> Table:
    """Return the losses at epochs 1, 2, 5, 10, 20, 50, ... and at the end, in a section for each run compared."""
    others = "; ".join(f"{run.method.name}: {run.last.test_loss:.2f}" for run in (*results.adamw, *results.longer))
    made = Table(title=f"Autoencoder on {results.images.name}", caption=others and f"Final test loss of {others}")
    made.add_column("method")
    for name in ("epoch", "train loss", "test loss", "seconds"):
        made.add_column(name, justify="right")
    milestones = {factor * 10**power for factor in (1, 2, 5) for power in range(7)}
    for run in results.shown:
        rows = [point for point in run.points if point.epoch in milestones or point is run.last]
        for point in rows:
            name = run.method.name if point is rows[0] else ""
            losses = (f"{point.train_loss:.2f}", f"{point.test_loss:.2f}")
            made.add_row(name, str(point.epoch), *losses, f"{point.seconds:.1f}", end_section=point is run.last)
    return made


def verdict(results: Results) -> str:
    """Return what the numbers say, in a line."""
    fishleg, rivals = results.fishleg, (results.best_adamw, results.equal_seconds)
    if fishleg is None or None in rivals:
        return "; ".join(_outcome(run) for run in results.shown)
    parts = []
    for rival, what in zip(rivals, ("equal epochs", "equal seconds"), strict=True):
        change = 100 * (fishleg.last.test_loss / rival.last.test_loss - 1)
        word = "below" if change < 0 else "above" if change > 0 else "away from"
        parts.append(f"at {what} FishLeg is {abs(change):.1f}% {word} {_outcome(rival)}")
    return f"{_outcome(fishleg)}; {'; '.join(parts)}."


def _outcome(run: Run) -> str:
    """Return where a run ended, in words."""
    end = run.last
    return f"{run.method.name} (test loss {end.test_loss:.2f} at epoch {end.epoch}, {end.seconds:.1f} s)"


def picture(results: Results) -> Figure:
    """Return the losses against epochs and seconds, over some test images with their reconstructions."""
    figure = Figure(figsize=(11, 4.6 + 0.6 * len(results.shown)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 0.6 + 0.6 * len(results.shown)))
    left, right = upper.subplots(1, 2, sharey=True)
    for axes, unit in ((left, "epoch"), (right, "seconds")):
        for color, run in zip(("tab:red", "tab:blue", "tab:cyan"), results.shown, strict=False):
            places = [getattr(point, unit) for point in run.points[1:]]  # the start would hide the rest
            axes.plot(places, [point.test_loss for point in run.points[1:]], color=color, label=run.method.name)
            axes.plot(places, [point.train_loss for point in run.points[1:]], ":", color=color)
        axes.grid(alpha=0.3)
    left.set(xlabel="epoch", ylabel="loss (solid: test, dotted: train)")
    right.set(xlabel="seconds of training")
    right.legend()
    _draw_images(lower, results)
    return figure


def _draw_images(figure: SubFigure, results: Results) -> None:
    """Draw a row of test images, and below it a row for each run that reconstructs them."""
    height = results.images.image_shape[0]
    rows = [results.images.test[:SHOWN], *(run.reconstructions for run in results.shown)]
    images = rearrange(torch.stack(rows), "r n (h w) -> r n h w", h=height)
    edge = height // 8
    tiles = rearrange(nn.functional.pad(images, (edge,) * 4), "r n h w -> (r h) (n w)")
    axes = figure.subplots()
    axes.imshow(tiles.numpy(), cmap="gray_r", vmin=0, vmax=1)
    step = len(tiles) / len(rows)
    names = ["test images", *(run.method.name.replace(", ", ",\n") for run in results.shown)]
    axes.set_yticks([step * (row + 0.5) for row in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
