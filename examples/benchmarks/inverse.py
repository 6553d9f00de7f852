r"""Train small networks towards a teacher, and measure how far Q is from the inverse of the exact damped Fisher.

    python examples/benchmarks/inverse.py --plot inverse.png     # a deep linear network and an MLP; some minutes

Inputs are Gaussian with eigenvalues from 0.1 to 10, new ones at every step; targets are the outputs of a teacher, with
noise. At points along training the dense Fisher of a fixed set of inputs is formed at the present parameters
(``fishleg_func.reference``), in float64. Two relative errors are taken, of Q, a matrix, to :math:`D = (F + \gamma
I)^{-1}`: :math:`\|Q - D\|_F / \|D\|_F`, and along the gradient g, :math:`\|Qg - Dg\| / \|Dg\|`. Q has no entries
between layers. "no coupling" is what the inverse of F without those entries reaches: the bound for any Q by layers.

All methods have the same rate, which falls linearly to zero. "kfac" is FishLeg that never updates λ.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.step import FishLegStep

CONDITION = 100.0  # of the inputs' covariance
BATCH, SAMPLE = 100, 64  # examples of a step, and those that the Fisher is taken over
NOISE = 0.1  # of the targets of the linear network
DAMPING = 1e-3
METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"update_aux_every": 0},
    "fishleg": {},
    "fishleg every=10": {"update_aux_every": 10},
    "fishleg every=1": {"update_aux_every": 1},
    "fishleg u='gradient'": {"u": "gradient"},
    "fishleg u='gradient' every=10": {"u": "gradient", "update_aux_every": 10},
}


@dataclass(frozen=True)
class Network:
    """What is trained."""

    title: str
    make: Callable[[], nn.Sequential]
    likelihood: ff.likelihoods.Likelihood
    name: str  # of the likelihood, for the reference
    targets: Callable[[Tensor, torch.Generator], Tensor]  # from the teacher's outputs


@dataclass(frozen=True)
class Point:
    """How far Q is at a step, and how far the inverse without coupling."""

    step: int
    loss: float
    matrix: float
    matrix_bound: float
    gradient: float
    gradient_bound: float


def deep_linear() -> nn.Sequential:
    """Return a linear network of three layers."""
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in pairwise((12, 12, 12, 12)))).double()


def mlp() -> nn.Sequential:
    """Return a classifier with a hidden layer."""
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)).double()


def noisy(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return outputs with noise."""
    return outputs + NOISE * torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)


def drawn(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return classes drawn from logits, three times as large for sharper classes."""
    return torch.multinomial((3 * outputs).softmax(-1), 1, generator=generator).squeeze(-1)


NETWORKS = {
    "linear": Network("deep linear network", deep_linear, ff.likelihoods.Gaussian(), "gaussian", noisy),
    "mlp": Network("MLP with tanh, classes", mlp, ff.likelihoods.Categorical(), "categorical", drawn),
}


def inputs(count: int, generator: torch.Generator) -> Tensor:
    """Return Gaussian inputs ``[count, 12]``."""
    half = math.log10(CONDITION) / 2
    scale = torch.logspace(-half, half, 12, dtype=torch.float64).sqrt()
    return torch.randn(count, 12, generator=generator, dtype=torch.float64) * scale


def follow(network: Network, method: str, steps: int, points: int, seed: int) -> list[Point]:
    """Train, and measure at steps that are evenly spaced from the tenth on."""
    torch.manual_seed(seed)
    teacher, model = network.make(), network.make()
    generator = torch.Generator().manual_seed(seed)
    held = inputs(SAMPLE, generator)
    held_targets = network.targets(teacher(held).detach(), generator)
    step = ff.fishlegify(model, network.likelihood, damping=DAMPING, **METHODS[method])
    rate, marks, found = step.hyper.lr.item(), {round(10 + (steps - 10) * i / (points - 1)) for i in range(points)}, []
    for t in range(steps):
        x = inputs(BATCH, generator)
        step.hyper.lr.fill_(rate * (1 - t / steps))
        step(x, network.targets(teacher(x).detach(), generator))
        if t + 1 in marks:
            found.append(measure(network, step, t + 1, held, held_targets))
    return found


def measure(network: Network, step: FishLegStep, t: int, x: Tensor, y: Tensor) -> Point:
    """Return how far Q is now."""
    fisher = reference.fisher(step.model, x, network.name)
    inverse = reference.damped_inverse(fisher, DAMPING)
    q, uncoupled = torch.zeros_like(fisher), torch.zeros_like(fisher)
    for name, (positions, _) in reference.block_indices(step.model).items():
        block = positions[:, None], positions
        q[block], uncoupled[block] = step.q[name].dense(), fisher[block]
    bound = reference.damped_inverse(uncoupled, DAMPING)
    loss = network.likelihood.nll(step.model(x), y)
    g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(step.model.parameters()))])

    def relative(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    matrix, gradient = (relative(a, inverse) for a in (q, bound)), (relative(a @ g, inverse @ g) for a in (q, bound))
    return Point(t, loss.item(), *matrix, *gradient)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, list[Point]]]:
    """Train with every method, print a table, draw a picture.

    Args:
        argv: Command-line arguments; None takes those of the process.

    Returns:
        Points by network and method.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--points", type=int, default=8, help="at which Q is measured (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    if args.points < 2 or args.steps < 10 * args.points:
        parser.error(f"--points {args.points} must be >= 2, and --steps {args.steps} >= 10 for each")
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[Point]]] = {}
    for name in args.networks:
        network = NETWORKS[name]
        found[name] = {method: follow(network, method, args.steps, args.points, args.seed) for method in METHODS}
        Console().print(table(network, found[name]))
    if args.json is not None:
        args.json.write_text(
            json.dumps({n: {m: [asdict(p) for p in points] for m, points in of.items()} for n, of in found.items()})
        )
    if args.plot is not None:
        picture(found).savefig(args.plot, dpi=150)
    return found


def table(network: Network, found: dict[str, list[Point]]) -> Table:
    """Return the errors at the start, in the middle and at the end."""
    made = Table("method", title=network.title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("step", "loss", "matrix", "no coupling", "gradient", "no coupling"):
        made.add_column(name, justify="right")
    for method, points in found.items():
        for point in (points[0], points[len(points) // 2], points[-1]):
            errors = (point.matrix, point.matrix_bound, point.gradient, point.gradient_bound)
            first = method if point is points[0] else ""
            cells = (f"{point.loss:.4g}", *(f"{error:.3f}" for error in errors))
            made.add_row(first, str(point.step), *cells, end_section=point is points[-1])
    return made


def picture(found: dict[str, dict[str, list[Point]]]) -> Figure:
    """Return the errors along training: a row for each network, the matrix to the left, the gradient to the right."""
    figure = Figure(figsize=(11, 4 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 2, squeeze=False)
    for row, (name, of) in zip(rows, found.items(), strict=True):
        for axes, what in zip(row, ("matrix", "gradient"), strict=True):
            for (method, points), color in zip(of.items(), ("C7", "C0", "C2", "C3", "C1", "C4"), strict=True):
                steps = [point.step for point in points]
                axes.plot(steps, [getattr(point, what) for point in points], color=color, label=method)
                axes.plot(steps, [getattr(point, f"{what}_bound") for point in points], ":", color=color)
            axes.set(title=f"{NETWORKS[name].title}: Q, {what}", xlabel="step", ylabel="relative error")
            axes.grid(alpha=0.3)
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title="dotted: no coupling"
    )
    return figure


if __name__ == "__main__":
    main()
