r"""Solve $(F + \gamma I)x = b$ by conjugate gradients, plain and preconditioned with Q: products with F.

    python examples/benchmarks/conjugate.py                            # an MLP on digits: a minute
    python examples/benchmarks/conjugate.py --data fashion-mnist       # an MLP on Fashion-MNIST: some minutes

A multilayer perceptron is trained, and $F$ is the exact Fisher of some training images. Q is of low rank
(``FisherOperator.inverse``), which takes as many products with F as it has ranks before the first iteration, or learned
by layers (``fishleg_func.estimate_inverse_fisher``), which takes one product with the Fisher of a batch of all training
images for each update. Right-hand sides are the mean gradient of the images in F and a standard normal vector.
$\gamma$ is what ``damping=None`` comes to at the end of training, or what is given.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

BATCH = 200


@dataclass(frozen=True)
class Count:
    """Iterations for one right-hand side, and the products with F that the preconditioner was made of."""

    side: str
    method: str
    iterations: int
    converged: bool
    built: int


def trained(images: data.ImageSet, hidden: int, epochs: int) -> tuple[nn.Module, float]:
    """Train an MLP with FishLeg, and return it with the damping at the end."""
    assert images.train_labels is not None
    classes = int(images.train_labels.max()) + 1
    model = nn.Sequential(nn.Linear(images.train.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))
    loader = DataLoader(TensorDataset(images.train, images.train_labels), BATCH, shuffle=True)
    steps, done = epochs * len(loader), 0
    with ff.fishlegify(model, ff.likelihoods.Categorical()) as step:
        for _ in range(epochs):
            for x, y in loader:
                step.hyper.lr.fill_(3e-2 * (1 - done / steps))
                step(x, y)
                done += 1
        return model, float(step.damping)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the mean gradient of the loss, by name."""
    loss = ff.likelihoods.Categorical().nll(model(x), y)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def count(
    model: nn.Module,
    images: data.ImageSet,
    damping: float,
    families: Sequence[str],
    ranks: Sequence[int],
    *,
    updates: int,
    examples: int,
    tol: float = 1e-5,
) -> list[Count]:
    """Count iterations for each right-hand side, without Q, with each family and with each rank."""
    assert images.train_labels is not None
    likelihood = ff.likelihoods.Categorical()
    x, y = images.train[:examples], images.train_labels[:examples]
    operator = ff.FisherOperator(
        model, likelihood, list(zip(x.split(BATCH), y.split(BATCH), strict=True)), damping=damping
    )
    normal = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
    sides = {"gradient": operator.flatten(gradient(model, x, y)), "normal": normal}
    counts = []

    def solve(method: str, preconditioner: ff.InverseFisher | None, built: int) -> None:
        for side, b in sides.items():
            solution = operator.solve(b, preconditioner=preconditioner, tol=tol)
            counts.append(Count(side, method, solution.iterations, solution.converged, built))

    solve("plain", None, 0)
    for family in families:
        loader = DataLoader(TensorDataset(images.train, images.train_labels), BATCH, shuffle=True)
        q = ff.estimate_inverse_fisher(model, likelihood, loader, damping=damping, q=family, updates=updates)
        solve(family, q, updates)
    for rank in ranks:
        solve(f"rank {rank}", operator.inverse(rank, generator=torch.Generator().manual_seed(0)), rank)
    return counts


def main(arguments: Sequence[str] | None = None) -> list[Count]:
    """Train, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=("digits", "fashion-mnist"))
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=1000, help="images in F")
    parser.add_argument("--updates", type=int, default=1000, help="auxiliary updates")
    parser.add_argument("--damping", type=float, help="gamma")
    parser.add_argument("--families", default="kfac,eigen,diagonal", help="of a learned Q, or an empty string")
    parser.add_argument("--ranks", default="50,200", help="of a Q of low rank, or an empty string")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    images = data.load(given.data)
    start = time.perf_counter()
    model, damping = trained(images, given.hidden, given.epochs)
    damping = given.damping or damping
    families, ranks = [f for f in given.families.split(",") if f], [int(r) for r in given.ranks.split(",") if r]
    counts = count(model, images, damping, families, ranks, updates=given.updates, examples=given.examples)
    size = sum(p.numel() for p in model.parameters())
    title = f"{given.data}, {size} parameters, gamma = {damping:.2g}: {time.perf_counter() - start:.0f} s"
    table = Table(title=title, box=box.SIMPLE)
    for head in ("right-hand side", "preconditioner", "products for Q", "iterations", "of plain"):
        table.add_column(head, justify="left" if head[:5] in ("right", "preco") else "right")
    plain = {c.side: c.iterations for c in counts if c.method == "plain"}
    for c in counts:
        share = f"{c.iterations / plain[c.side]:.2f}"
        table.add_row(
            c.side, c.method, str(c.built), f"{c.iterations}{'' if c.converged else ' (not converged)'}", share
        )
    Console().print(table)
    return counts


if __name__ == "__main__":
    main()
