"""Every type of layer, as small a model each as shows it: data of the matrix in the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import generator, randn
from test_packed import Adapted, TiedTable
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

BATCH, CLASSES = 8, 3


class Calls(nn.Module):
    """A module that is called in its own way."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


class Direct(nn.Module):
    """Parameters that no layer holds: a matrix, a vector, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(3))
        self.scalar = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scalar * (x @ self.matrix.T).tanh() * self.vector


def last(m: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = m(x)[0]
    return out[:, -1]


def repeated(cell: nn.Module, x: Tensor) -> Tensor:
    """Run a cell over time; an LSTM's state is a pair."""
    state = None
    for t in range(x.shape[1]):
        state = cell(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


def attending(m: nn.Module, x: Tensor) -> Tensor:
    return m(x, x[..., : m.kdim], x[..., : m.vdim], need_weights=False)[0]


def norms(*kinds: Callable[[int], nn.Module]) -> nn.Module:
    """Norms over three, two and one dimensions, something that is not linear between them."""
    three, two, one = (kind(2) for kind in kinds)
    return nn.Sequential(three, nn.Tanh(), nn.Flatten(3), two, nn.Tanh(), nn.Flatten(2), one)


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 4))


@dataclass(frozen=True)
class Layer:
    """A layer type.

    Attributes:
        build: Makes a module with it; a head follows.
        shape: Of one example; integers below ``vocabulary`` where that is positive.
        vocabulary: Size of the table that the inputs index.
        group: Those of one group are compiled in one graph.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0
    group: str = "dense"

    def inputs(self, seed: int = 0) -> Tensor:
        if self.vocabulary:
            return torch.randint(self.vocabulary, (BATCH, *self.shape), generator=generator(seed))
        return randn(BATCH, *self.shape, seed=seed)


def convolution(build: Callable[[], nn.Module], *shape: int) -> Layer:
    return Layer(build, shape, group="convolutions")


def recurrent(build: Callable[..., nn.Module], call: Callable[[nn.Module, Tensor], Tensor], **options: bool) -> Layer:
    return Layer(lambda: Calls(build(2, 3, **options), call), (3, 2), group="recurrent")


def attention(**options: int) -> Layer:
    return Layer(
        lambda: Calls(nn.MultiheadAttention(4, 2, batch_first=True, **options), attending), (3, 4), group="tables"
    )


def instance(kind: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    return lambda channels: kind(channels, affine=True)


LAYERS: dict[str, Layer] = {
    "Linear": Layer(lambda: nn.Linear(4, 5), (4,)),
    "Linear, called twice": Layer(lambda: Calls(nn.Linear(4, 4), lambda m, x: m(m(x).tanh())), (4,)),
    "Linear after a frozen one": Layer(frozen, (4,)),
    "Bilinear": Layer(lambda: Calls(nn.Bilinear(2, 3, 4), lambda m, x: m(x[:, :2], x[:, 1:])), (4,)),
    "Conv1d": convolution(lambda: nn.Conv1d(2, 3, 2), 2, 4),
    "Conv2d": convolution(lambda: nn.Conv2d(2, 3, 2), 2, 3, 3),
    "Conv3d": convolution(lambda: nn.Conv3d(1, 2, 2), 1, 3, 3, 3),
    "Conv2d, groups": convolution(lambda: nn.Conv2d(2, 4, 2, groups=2), 2, 3, 3),
    "Conv2d, dilation, circular padding": convolution(
        lambda: nn.Conv2d(1, 2, 2, dilation=2, padding=1, padding_mode="circular"), 1, 3, 3
    ),
    "ConvTranspose1d": convolution(lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), 2, 3),
    "ConvTranspose2d": convolution(lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), 2, 2, 2),
    "ConvTranspose3d": convolution(lambda: nn.ConvTranspose3d(1, 2, 2), 1, 2, 2, 2),
    "ConvTranspose2d, groups, dilation": convolution(
        lambda: nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2), 2, 2, 2
    ),
    "Embedding": Layer(lambda: nn.Embedding(6, 4), (3,), vocabulary=6, group="tables"),
    "EmbeddingBag": Layer(lambda: nn.EmbeddingBag(6, 4), (3,), vocabulary=6, group="tables"),
    "Embedding tied to an output layer": Layer(TiedTable, (3,), vocabulary=6, group="tables"),
    "MultiheadAttention": attention(),
    "MultiheadAttention, kdim, vdim": attention(kdim=3, vdim=2),
    "RNN": recurrent(nn.RNN, last, batch_first=True),
    "GRU": recurrent(nn.GRU, last, batch_first=True),
    "LSTM": recurrent(nn.LSTM, last, batch_first=True),
    "RNNCell": recurrent(nn.RNNCell, repeated),
    "GRUCell": recurrent(nn.GRUCell, repeated),
    "LSTMCell": recurrent(nn.LSTMCell, repeated),
    "LayerNorm": Layer(lambda: nn.LayerNorm(4), (3, 4), group="norms"),
    "RMSNorm": Layer(lambda: nn.RMSNorm(4), (3, 4), group="norms"),
    "GroupNorm": Layer(lambda: nn.GroupNorm(2, 4), (4, 3), group="norms"),
    "BatchNorm1d, 2d, 3d": Layer(
        lambda: norms(nn.BatchNorm3d, nn.BatchNorm2d, nn.BatchNorm1d), (2, 2, 2, 2), group="norms"
    ),
    "InstanceNorm1d, 2d, 3d, affine": Layer(
        lambda: norms(*map(instance, (nn.InstanceNorm3d, nn.InstanceNorm2d, nn.InstanceNorm1d))),
        (2, 2, 2, 2), group="norms",
    ),
    "PReLU": Layer(lambda: nn.PReLU(4), (4,)),
    "Linear with weight_norm": Layer(lambda: weight_norm(nn.Linear(4, 5)), (4,)),
    "Linear with spectral_norm": Layer(lambda: spectral_norm(nn.Linear(4, 5)), (4,)),
    "low-rank adapter (LoRA) on a frozen Linear": Layer(Adapted, (3,)),
    "parameters held directly": Layer(Direct, (4,)),
}  # fmt: skip


class Model(nn.Module):
    """Layers side by side, each with an input of its own, and one linear head."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bodies = nn.ModuleList(LAYERS[name].build() for name in names)
        self.double()
        with torch.no_grad():
            width = self.eval().features(*(LAYERS[name].inputs() for name in names)).shape[1]
        self.head = nn.Linear(width, CLASSES).double()
        self.train()

    def features(self, *inputs: Tensor) -> Tensor:
        """Return what the layers make of their inputs, side by side."""
        return torch.cat([body(x).flatten(1).tanh() for body, x in zip(self.bodies, inputs, strict=True)], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(*inputs))
        return logits
