r"""Prune a trained classifier by the learned inverse Fisher and by what it competes with: accuracy against sparsity.

    python examples/pruning.py                           # an MLP on digits: some minutes
    python examples/pruning.py --data fashion-mnist      # a CNN on Fashion-MNIST

One shot: weights of all layers are removed by saliency, nothing is trained afterwards. Gradual (``--steps``): in steps
to the highest sparsity, with training in between, the inverse refined at each step and not estimated anew.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import data
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff

LIKELIHOOD = ff.likelihoods.Categorical()
BATCH = 100

Inverse = ff.InverseFisher | ff.pruning.BlockInverse


@dataclass(frozen=True)
class Problem:
    """A model, and batches to train and to test it on."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loader(self, size: int = BATCH) -> DataLoader:
        return DataLoader(TensorDataset(*self.train), size, shuffle=True)

    def accuracy(self, model: nn.Module) -> float:
        """Return the percentage of test images that a model in eval mode classifies correctly."""
        with torch.no_grad():
            hits = [(model(x).argmax(1) == y).sum() for x, y in zip(*(t.split(1000) for t in self.test), strict=True)]
        return 100 * float(sum(hits)) / len(self.test[1])


def mlp() -> nn.Sequential:
    """Return a classifier of rows of 64 pixels."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Sequential:
    """Return a classifier of images of 28 x 28 pixels."""

    def stage(n: int, m: int) -> list[nn.Module]:
        return [nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *stage(1, 16), *stage(16, 32), nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def fit(model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
    """Train with AdamW at a rate that falls to zero, and leave the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(name: str, folder: str | None, epochs: int) -> Problem:
    """Load the images and train the model for them."""
    images = data.load(name, folder)
    assert images.train_labels is not None and images.test_labels is not None
    flat = name == "digits"
    shape = (-1,) if flat else (-1, 1, *images.image_shape)
    train, test = (x if flat else x.view(shape) for x in (images.train, images.test))
    problem = Problem(mlp() if flat else cnn(), (train, images.train_labels), (test, images.test_labels))
    fit(problem.model, problem.loader(), epochs, 2e-3)
    return problem


def learned(model: nn.Module, problem: Problem, damping: float, updates: int, before: Inverse | None = None) -> Inverse:
    """Return the learned inverse, after ``updates`` more than the one before."""
    fit = before.fit if isinstance(before, ff.InverseFisher) else None
    done, state = (fit.updates, fit.state) if fit else (0, None)
    return ff.estimate_inverse_fisher(
        model, LIKELIHOOD, problem.loader(), damping=damping, updates=done + updates, check_every=updates, state=state
    )


def inverses(
    problem: Problem, damping: float, updates: int, size: int, examples: int
) -> dict[str, Callable[[], Inverse]]:
    """Return what makes the inverse of each method."""
    x, y = (t[:examples].split(20) for t in problem.train)
    batches = list(zip(x, y, strict=True))

    def block(size: int, kind: str) -> Inverse:
        return ff.pruning.block_inverse(problem.model, LIKELIHOOD, batches, damping=damping, size=size, kind=kind)

    return {
        "magnitude": lambda: ff.pruning.magnitude(problem.model),
        "diagonal Fisher": lambda: block(1, "empirical"),
        f"OBS, blocks of {size}": lambda: block(size, "exact"),
        "FishLeg": lambda: learned(problem.model, problem, damping, updates),
    }


def one_shot(problem: Problem, inverse: Inverse, sparsities: Sequence[float], rounds: int) -> list[float]:
    """Return the accuracy at each sparsity, each pruned from the trained model."""
    accuracies = []
    for sparsity in sparsities:
        model = copy.deepcopy(problem.model)
        ff.pruning.prune(model, inverse, sparsity, rounds=rounds)
        accuracies.append(problem.accuracy(model))
    return accuracies


def gradual(
    problem: Problem, sparsities: Sequence[float], damping: float, updates: int, epochs: int, rounds: int
) -> list[float]:
    """Return the accuracy after each step of pruning and training."""
    model, accuracies = copy.deepcopy(problem.model), []

    def train(sparsity: float) -> None:
        fit(model, problem.loader(), epochs, 1e-3)
        accuracies.append(problem.accuracy(model))

    ff.pruning.prune_gradually(
        model, sparsities, lambda before: learned(model, problem, damping, updates, before), train, rounds=rounds
    )
    return accuracies


def draw(curves: dict[str, tuple[Sequence[float], list[float]]], dense: float, path: Path) -> None:
    """Draw accuracy against sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.axhline(dense, color="0.6", linestyle=":", label="dense")
    for name, (sparsities, accuracies) in curves.items():
        axes.plot([100 * s for s in sparsities], accuracies, "o-", markersize=3, label=name)
    axes.set(xlabel="weights removed (%)", ylabel="test accuracy (%)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Sequence[float], list[float]]]:
    """Train, prune, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=("digits", "fashion-mnist"))
    parser.add_argument("--data-dir", help="folder of the idx files")
    parser.add_argument("--epochs", type=int, help="of training; default 20 for digits, 3 for Fashion-MNIST")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--damping", type=float, default=1e-3, help="gamma")
    parser.add_argument("--updates", type=int, default=300, help="auxiliary updates")
    parser.add_argument("--rounds", type=int, default=10, help="of choosing and making up, in one shot")
    parser.add_argument("--size", type=int, default=500, help="of the dense blocks")
    parser.add_argument("--examples", type=int, default=1000, help="images for diagonal and dense blocks")
    parser.add_argument("--steps", type=int, default=5, help="of gradual pruning, 0 for none")
    parser.add_argument("--retrain", type=int, default=1, help="epochs after each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("pruning.png"))
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    problem = trained(given.data, given.data_dir, given.epochs or (20 if given.data == "digits" else 3))
    dense = problem.accuracy(problem.model)
    curves: dict[str, tuple[Sequence[float], list[float]]] = {}
    console = Console()
    for name, make in inverses(problem, given.damping, given.updates, given.size, given.examples).items():
        start = time.perf_counter()
        curves[name] = (given.sparsities, one_shot(problem, make(), given.sparsities, given.rounds))
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")
    if given.steps:
        steps = ff.pruning.cubic_schedule(0.0, max(given.sparsities), given.steps)
        found = gradual(problem, steps, given.damping, given.updates // 3, given.retrain, given.rounds)
        curves["FishLeg, gradual"] = (steps, found)
    table = Table(title=f"{given.data}: dense {dense:.2f} %", box=box.SIMPLE)
    for head in ("method", "sparsity (%)", "accuracy (%)"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for name, (sparsities, accuracies) in curves.items():
        for sparsity, accuracy in zip(sparsities, accuracies, strict=True):
            table.add_row(name, f"{100 * sparsity:.1f}", f"{accuracy:.2f}")
    console.print(table)
    draw(curves, dense, given.picture)
    return curves


if __name__ == "__main__":
    main()
