"""What the race trains: tasks with a model, a likelihood, real or generated data, and a usual budget."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from _common import Problem, Transformer, autoencoder, bernoulli, categorical, cnn
from torch import Tensor, nn

import fishleg_func as ff

sys.path.append(str(Path(__file__).parents[1]))
import data

CURVES = 30_000  # images, a third of them to test on
LENGTH, WIDTH, DEPTH = 64, 128, 2  # of the transformer and of its sequences
CHARACTERS, ASCII = 1_000_000, 128  # of the text to train on, and the number of its different characters
TEST_SEQUENCES = 512


@dataclass(frozen=True)
class Split:
    """Examples to train and to test on; of the two, the first is what the model is called with."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def to(self, device: str) -> "Split":
        """Return them on a device."""
        return Split(*((x.to(device), y.to(device)) for x, y in (self.train, self.test)))


@dataclass(frozen=True)
class Task:
    """What to train, on what, and how long."""

    title: str
    make: Callable[[], nn.Module]
    likelihood: ff.likelihoods.Likelihood
    loss: Callable[[Tensor, Tensor], Tensor]
    load: Callable[[], Split]
    batch_size: int
    epochs: int

    @property
    def classifies(self) -> bool:
        """Whether outputs are logits of classes, so that there is an accuracy."""
        return isinstance(self.likelihood, ff.likelihoods.Categorical)

    def problem(self, seed: int) -> Problem:
        """Return what the methods are made for; the model is the same for all of a seed."""

        def make() -> nn.Module:
            torch.manual_seed(seed)
            return self.make()

        def draw() -> tuple[Tensor, Tensor]:
            inputs, targets = self.load().train
            chosen = torch.randint(len(inputs), (self.batch_size,))
            return inputs[chosen], targets[chosen]

        return Problem(make, self.likelihood, self.loss, draw)


@cache
def images(name: str) -> Split:
    """Return a set of images, each its own target."""
    found = data.curves(CURVES) if name == "curves" else data.load(name)
    return Split((found.train, found.train), (found.test, found.test))


@cache
def labelled(name: str, flat: bool) -> Split:
    """Return a set of images with their classes, as rows of pixels or as ``[1, height, width]``."""
    found = data.load(name)
    shape = (-1,) if flat else (1, *found.image_shape)
    train, test = (x.unflatten(-1, shape) if not flat else x for x in (found.train, found.test))
    return Split((train, found.train_labels), (test, found.test_labels))


@cache
def text() -> Split:
    """Return sequences of characters and the characters that follow, from the sources of Python's standard library.

    Every tenth module is one to test on. All characters beyond ASCII are one character.
    """
    modules = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    parts = ["".join(m for i, m in enumerate(modules) if (i % 10 == 9) == test) for test in (False, True)]
    train, test = (torch.tensor([min(c, ASCII) for c in map(ord, part[:CHARACTERS])]) for part in parts)

    def cut(x: Tensor) -> tuple[Tensor, Tensor]:
        count = (len(x) - 1) // LENGTH
        return x[: count * LENGTH].view(count, LENGTH), x[1 : count * LENGTH + 1].view(count, LENGTH)

    return Split(cut(train), tuple(x[:TEST_SEQUENCES] for x in cut(test)))


def transformer() -> nn.Module:
    """Return a causal transformer for the text."""
    return Transformer(ASCII + 1, WIDTH, DEPTH, LENGTH)


def mlp() -> nn.Sequential:
    """Return a classifier of rows of 64 pixels."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _autoencoder(title: str, name: str, encoder: tuple[int, ...], epochs: int) -> Task:
    make = partial(autoencoder, encoder + encoder[-2::-1])
    return Task(title, make, ff.likelihoods.Bernoulli(), bernoulli, partial(images, name), 100, epochs)


def _classifier(title: str, make: Callable[[], nn.Module], load: Callable[[], Split], size: int, epochs: int) -> Task:
    return Task(title, make, ff.likelihoods.Categorical(), categorical, load, size, epochs)


TASKS = {
    "fashion-ae": _autoencoder("autoencoder, Fashion-MNIST", "fashion-mnist", (784, 1000, 500, 250, 30), 1),
    "curves-ae": _autoencoder("autoencoder, CURVES", "curves", (784, 400, 200, 100, 50, 25, 6), 10),
    "digits-ae": _autoencoder("autoencoder, digits", "digits", (64, 512, 256, 128, 30), 30),
    "digits": _classifier("classifier 64-128-64-10, digits", mlp, partial(labelled, "digits", flat=True), 50, 20),
    "fashion-cnn": _classifier(
        "CNN with BatchNorm, Fashion-MNIST", cnn, partial(labelled, "fashion-mnist", flat=False), 100, 3
    ),
    "text": _classifier("causal transformer, characters of Python's library", transformer, text, 16, 1),
}
