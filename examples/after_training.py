"""What is left after training: uncertainty, influence and memory from one inverse Fisher, a picture for each.

    python examples/after_training.py                       # all three, on scikit-learn's digits
    python examples/after_training.py --only uncertainty    # the Laplace posterior on digits that are turned
    python examples/after_training.py --only influence      # the most helpful and harmful training images
    python examples/after_training.py --only forgetting    # two tasks in turn, with the penalty and without

A network of one hidden layer is trained, Q is estimated once, and each part uses it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff

PARTS = ("uncertainty", "influence", "forgetting")
CATEGORICAL = ff.likelihoods.Categorical()
ANGLES = tuple(range(0, 181, 15))
PENALTIES = {"none": None, "EWC (diagonal)": "diagonal", "kfac": "kfac"}
BATCH, BINS, SHOWN = 100, 15, 4


def network(hidden: int) -> nn.Sequential:
    """Return an untrained network for 8 x 8 pixels."""
    return nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def loader(x: Tensor, y: Tensor, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return shuffled batches."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=generator)


def train(
    model: nn.Module,
    batches: DataLoader[tuple[Tensor, ...]],
    epochs: int,
    decay: float,
    *,
    output: Callable[[Tensor], Tensor] = lambda f: f,
    penalty: Callable[[], Tensor] | None = None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train with Adam; ``decay`` is the prior precision over the number of examples."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=decay)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(output(model(x)), y)
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
        after_epoch()


def estimate(model: nn.Module, x: Tensor, y: Tensor, damping: float, updates: int, **keywords: Any) -> ff.InverseFisher:
    """Estimate Q of a trained model."""
    generator = torch.Generator().manual_seed(0)
    return ff.estimate_inverse_fisher(
        model, CATEGORICAL, loader(x, y, 1), damping=damping, updates=updates,
        check_every=updates, generator=generator, **keywords,
    )  # fmt: skip


# --- uncertainty ---


@dataclass(frozen=True)
class Calibration:
    """How good some probabilities are.

    Attributes:
        accuracy: Fraction of labels that are the most probable class.
        nll: Mean negative log-probability of the labels, in nats.
        ece: Expected calibration error: mean distance of confidence and accuracy over bins of confidence.
    """

    accuracy: float
    nll: float
    ece: float

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Calibration:
        """Compare probabilities ``[N, C]`` with labels ``[N]``."""
        confidence, guess = probabilities.max(1)
        right = (guess == labels).double()
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right - confidence.double())
        nll = F.nll_loss(probabilities.clamp(min=1e-30).log(), labels)
        return cls(float(right.mean()), float(nll), float(gaps.abs().sum() / len(labels)))


def turned(images: Tensor, degrees: float) -> Tensor:
    """Turn flat 8 x 8 images about their middle, bilinearly."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    c, s = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([c, -s, 0 * c]), torch.stack([s, c, 0 * c])]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def uncertainty(images: data.ImageSet, config: argparse.Namespace) -> dict[str, list[Calibration]]:
    """Compare the trained network with its Laplace posterior on images that are turned more and more."""
    x, y = images.train, images.train_labels
    model = network(config.hidden)
    decay = config.prior / len(x)
    train(model, loader(x, y, 0), config.epochs, decay)
    Q = estimate(model, x, y, decay, config.updates)
    posterior = ff.Laplace(model, CATEGORICAL, Q, [(x, y)])
    tuned = posterior.tuned()
    print(f"prior precision {posterior.prior_precision:.3g}, tuned {tuned.prior_precision:.3g}")
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "MAP": lambda a: model(a).detach().softmax(1),
        "Laplace, probit": posterior.predict,
        "Laplace, tuned": tuned.predict,
        "Laplace, networks": lambda a: posterior.predict(
            a, method="network", samples=30, generator=torch.Generator().manual_seed(2)
        ),
    }
    found: dict[str, list[Calibration]] = {name: [] for name in methods}
    for degrees in ANGLES:
        rotated = turned(images.test, degrees)
        for name, predict in methods.items():
            found[name].append(Calibration.of(predict(rotated), images.test_labels))
            last = found[name][-1]
            print(f"{degrees:4d}° {name:18s} accuracy {last.accuracy:.3f}  NLL {last.nll:.3f}  ECE {last.ece:.3f}")
    return found


def plot_uncertainty(found: dict[str, list[Calibration]], axes: Any) -> None:
    """Draw NLL and ECE against the angle."""
    for axis, what in zip(axes, ("nll", "ece"), strict=True):
        for name, curve in found.items():
            axis.plot(ANGLES, [getattr(c, what) for c in curve], label=name)
        axis.set(xlabel="rotation (degrees)", ylabel=what.upper())
    axes[0].legend(fontsize=7)


# --- influence ---


def influence(images: data.ImageSet, config: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the influence of training images on the test images that fare worst, and the numbers of those."""
    x, y = images.train, images.train_labels
    model = network(config.hidden)
    decay = config.prior / len(x)
    train(model, loader(x, y, 0), config.epochs, decay)
    Q = estimate(model, x, y, decay, config.updates)
    losses = F.cross_entropy(model(images.test), images.test_labels, reduction="none").detach()
    worst = losses.topk(SHOWN).indices
    scores = ff.influence_scores(model, CATEGORICAL, Q, [(x, y)], [(images.test[worst], images.test_labels[worst])])
    own = ff.self_influence(model, CATEGORICAL, Q, [(x, y)])
    print(f"self-influence: median {own.median():.3g}, most {own.max():.3g} (training image {int(own.argmax())})")
    return scores, worst


def plot_influence(images: data.ImageSet, scores: Tensor, worst: Tensor, axes: Any) -> None:
    """Draw each test image between its most helpful and most harmful training images."""
    for row, (score, test) in zip(axes, zip(scores, worst, strict=True), strict=True):
        order = score.argsort(descending=True)
        chosen = [*order[:3].tolist(), *order[-3:].tolist()]
        pictures = [(images.test[test], f"test: {images.test_labels[test]}")]
        pictures += [(images.train[i], f"{images.train_labels[i]} ({score[i] / len(score):+.2g})") for i in chosen]
        for axis, (picture, title) in zip(row, pictures, strict=True):
            axis.imshow(picture.view(images.image_shape).numpy(), cmap="gray_r")
            axis.set_title(title, fontsize=8)
            axis.axis("off")


# --- forgetting ---


def forgetting(images: data.ImageSet, config: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Train on digits 0 to 4, then on 5 to 9, and return the accuracies on both after each epoch of the second."""

    def task(of: Tensor, labels: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        chosen = (labels >= 5) == second
        return of[chosen], labels[chosen] - 5 * second

    def head(second: bool) -> Callable[[Tensor], Tensor]:
        return lambda f: f[:, 5:] if second else f[:, :5]

    tasks = [task(images.train, images.train_labels, second) for second in (False, True)]
    tests = [task(images.test, images.test_labels, second) for second in (False, True)]
    first = network(config.hidden)
    decay = config.prior / len(tasks[0][0])
    train(first, loader(*tasks[0], 0), config.epochs, decay, output=head(False))
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, family in PENALTIES.items():
        model, curve = copy.deepcopy(first), curves.setdefault(name, [])
        penalty = None
        if family is not None:
            Q = estimate(model, *tasks[0], decay, config.updates, q=family, output=head(False))
            penalty = ff.QuadraticPenalty(model, Q, weight=config.weight)

        def record(model: nn.Module = model, curve: list[tuple[float, float]] = curve) -> None:
            guesses = [head(bool(i))(model(x).detach()).argmax(1) for i, (x, _) in enumerate(tests)]
            old, new = (float((g == y).double().mean()) for g, (_, y) in zip(guesses, tests, strict=True))
            curve.append((old, new))

        record()
        train(model, loader(*tasks[1], 0), config.epochs, 0.0, output=head(True), penalty=penalty, after_epoch=record)
        print(f"{name:15s} first task {curve[0][0]:.3f} -> {curve[-1][0]:.3f}, second {curve[-1][1]:.3f}")
    return curves


def plot_forgetting(curves: dict[str, list[tuple[float, float]]], axes: Any) -> None:
    """Draw the accuracies on both tasks against epochs of the second."""
    for i, (axis, title) in enumerate(zip(axes, ("digits 0 to 4, learned first", "digits 5 to 9"), strict=True)):
        for name, curve in curves.items():
            axis.plot([point[i] for point in curve], label=name)
        axis.set(xlabel="epochs of the second task", ylabel="accuracy", title=title)
    axes[0].legend()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--hidden", type=int, default=32, help="width of the hidden layer")
    parser.add_argument("--epochs", type=int, default=40, help="of training; of each task where there are two")
    parser.add_argument("--updates", type=int, default=500, help="of Q")
    parser.add_argument("--prior", type=float, default=1.0, help="precision of the prior")
    parser.add_argument("--weight", type=float, default=30.0, help="of the penalty")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the pictures go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts, draw their pictures, and return what they found."""
    import matplotlib.pyplot as plt

    config, images, found = parse(arguments), data.digits(), {}
    for part in config.only:
        torch.manual_seed(0)
        if part == "influence":
            found[part] = influence(images, config)
            figure, axes = plt.subplots(SHOWN, 7, figsize=(8, 5))
            plot_influence(images, *found[part], axes)
        else:
            found[part] = (uncertainty if part == "uncertainty" else forgetting)(images, config)
            figure, axes = plt.subplots(1, 2, figsize=(8, 3))
            (plot_uncertainty if part == "uncertainty" else plot_forgetting)(found[part], axes)
        figure.tight_layout()
        figure.savefig(config.folder / f"{part}.png", dpi=120)
        plt.close(figure)
    return found


if __name__ == "__main__":
    main()
