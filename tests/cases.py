"""Models and batches as data, and the bridge between a step's packed quantities and the oracle's flat vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_func import likelihoods, reference
from fishleg_func.reference import Block
from fishleg_func.step import FishLegStep

SIGMA = 0.7
LIKELIHOODS: dict[str, likelihoods.Likelihood] = {
    "gaussian": likelihoods.Gaussian(SIGMA),
    "bernoulli": likelihoods.Bernoulli(),
    "categorical": likelihoods.Categorical(),
    "poisson": likelihoods.Poisson(),
}
FAMILIES = {
    "Kronecker": "kronecker",
    "KFAC": "kfac",
    "ScaledKronecker": "scaled_kronecker",
    "Eigen": "eigen",
    "Diagonal": "diagonal",
    "Dense": "dense",
    "Embedding": "embedding",
}  # class of a Q module: name of its family


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def filled(model: nn.Module, size: float = 0.5) -> nn.Module:
    """Give a model float64 parameters that depend neither on torch's defaults nor on the global stream."""
    norms = {f"{name}.weight" for name, m in model.named_modules() if "Norm" in type(m).__name__}
    for i, (name, p) in enumerate(model.double().named_parameters()):
        p.data.copy_(size * randn(*p.shape, seed=i) + (name in norms))
    return model


class Twice(nn.Module):
    """A layer that is called twice, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.cell(x).tanh()).tanh())


class Attention(nn.Module):
    """One encoder layer and a head at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@dataclass(frozen=True)
class Case:
    """A model in train mode, always with the same parameters, and the inputs that it takes.

    Attributes:
        build: Makes the model.
        shape: Of one example; integers below ``vocabulary`` where that is positive.
        vocabulary: Size of the table that the inputs index.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def model(self) -> nn.Module:
        return filled(self.build()).train()

    def inputs(self, batch: int = 5, seed: int = 0) -> Tensor:
        if self.vocabulary:
            return torch.randint(self.vocabulary, (batch, *self.shape), generator=generator(seed))
        return randn(batch, *self.shape, seed=seed)


CASES = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)),
    "cnn": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Tanh(),
            nn.Conv2d(4, 2, 2, padding=1, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2),
        ),
        (2, 3, 3),
    ),
    "twice": Case(Twice, (3,)),
    "sequence": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)), (3, 3)),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), (3,), vocabulary=6
    ),
    "attention": Case(Attention, (3, 4)),
}  # fmt: skip


def targets_for(model: nn.Module, x: Any, likelihood: str, seed: int = 0, masked: bool = True) -> Tensor:
    """Draw targets from the model itself; of class labels, mask about a third, the first one always."""
    with torch.no_grad():
        outputs = copy.deepcopy(model)(x)
    y = LIKELIHOODS[likelihood].sample(outputs, generator(seed))
    if likelihood == "categorical" and masked:
        hidden = torch.rand(y.shape, generator=generator(seed + 1)) < 0.3
        hidden.view(-1)[0], hidden.view(-1)[-1] = True, False
        y = y.masked_fill(hidden, -100)
    return y


def flat(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate tensors by name in the oracle's order."""
    return torch.cat([tensors[name].reshape(-1) for name in reference.names(model)])


def unflat(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """Undo :func:`flat`."""
    every = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pieces = vector.split([p.numel() for p in every.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(every.items(), pieces, strict=True)}


def from_packed(model: nn.Module, packed: Mapping[str, Tensor]) -> Tensor:
    """Put what a step keeps by block, packed, into the oracle's order."""
    layout = reference.block_indices(model)
    assert set(packed) == set(layout)
    whole = torch.zeros(sum(u.numel() for u in packed.values()), dtype=torch.float64)
    for name, u in packed.items():
        whole[layout[name][0]] = u.detach().double().reshape(-1)
    return whole


def drawn(step: FishLegStep) -> Tensor:
    """Draw the Gaussian probe of the next update of λ, of a model without a layer that is long on both sides."""
    noise = step._noise.fork(3)
    return from_packed(step.model, {k: noise.normal(p, i) for i, (k, p) in enumerate(step._direction.items())})


def lam_of(step: FishLegStep) -> dict[str, dict[str, Tensor]]:
    """Copy every λ."""
    return {name: {k: p.detach().clone() for k, p in q.named_parameters()} for name, q in step.q.items()}


def blocks_of(step: FishLegStep, lam: Mapping[str, Mapping[str, Tensor]] | None = None) -> dict[str, Block]:
    """Describe every Q to the oracle: the present basis, and ``lam`` or the present λ."""
    blocks, lam = {}, lam or lam_of(step)
    for name, q in step.q.items():
        family = FAMILIES[type(q).__name__]
        blocks[name] = Block(family, lam[name], basis_of(q, family))
    return blocks


def basis_of(q: nn.Module, family: str) -> dict[str, Tensor]:
    """Copy the basis, under the oracle's names."""
    return {k: getattr(q, k).clone() for k in sorted(reference.FAMILIES[family][1])}


def dense_q(step: FishLegStep) -> Tensor:
    """Return Q over all parameters in the oracle's order, made by the oracle."""
    layout, blocks = reference.block_indices(step.model), blocks_of(step)
    size = sum(len(where) for where, _ in layout.values())
    q = torch.zeros(size, size, dtype=torch.float64)
    for name, (where, shape) in layout.items():
        q[where[:, None], where] = reference.dense_q(*blocks[name], shape=shape)
    return q


def randomize_(step: FishLegStep, seed: int = 0, size: float = 0.2) -> None:
    """Move every λ and basis off its start, so that nothing holds only at the identity."""
    for i, q in enumerate(step.q.values()):
        randomize_q_(q, seed + 10 * i, size)
    step._curvature.renew()


@torch.no_grad()
def randomize_q_(q: nn.Module, seed: int = 0, size: float = 0.2) -> None:
    """Move λ and the basis of one Q module off their start; orthogonal bases stay so."""
    for j, (key, t) in enumerate((*q.named_parameters(), *q.named_buffers())):
        if key in ("L", "R", "s", "C_L", "C_R"):
            t.add_(size * randn(*t.shape, seed=seed + j).to(t))
        elif key in ("pair_L", "pair_R"):
            t[..., :-1, :].add_(size * randn(*t.shape, seed=seed + j)[..., :-1, :].triu().to(t))
        elif key == "c":
            t.mul_(1 + 2 * size * torch.rand(t.shape, generator=generator(seed + j)).to(t))
        if key.startswith("C") and type(q).__name__ == "Eigen":
            t.copy_(torch.linalg.qr(t)[0])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Walk over every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def snapshot(model: nn.Module, step: FishLegStep | None = None) -> dict[str, Any]:
    """Record all that a call which only looks must leave alone: compare two of these with :func:`assert_same`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    state = {
        "parameters": {k: p.detach().clone() for k, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {k: b.clone() for k, b in model.named_buffers()},
        "grads": {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None},
        "random": torch.get_rng_state(),
        "kinds": {(k, n): (type(p), id(p)) for k, m in modules.items() for n, p in m._parameters.items()},
        "hooks": {
            k: tuple(len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))
            for k, m in modules.items()
        },
        "training": {k: m.training for k, m in modules.items()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
    }  # fmt: skip
    if step is not None:
        state["q"] = {k: {n: t.clone() for n, t in q.state_dict().items()} for k, q in step.q.items()}
        state["step"] = [
            t.clone()
            for t in tensors_in([step._averages.m, step._direction, step._curvature.operators, step._noise.counter])
        ]
        state["hyper"] = {k: t.clone() for k, t in vars(step.hyper).items()}
    return state


def identical(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal, NaN to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Hold that two snapshots are equal, tensors bit for bit."""
    if isinstance(before, Tensor):
        assert identical(before, after), f"{where} changed"
    elif isinstance(before, Mapping):
        assert before.keys() == after.keys(), f"{where}: {before.keys() ^ after.keys()}"
        for key in before:
            assert_same(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list):
        assert len(before) == len(after), where
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert before == after, f"{where}: {before} became {after}"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Hold ‖actual − expected‖ <= tolerance ‖expected‖, for an expected value that is finite and not zero."""
    size = expected.detach().norm().item()
    assert 0 < size < float("inf"), f"{what}: the expected value has norm {size}, so the comparison would say nothing"
    error = (actual.detach().double() - expected.detach()).norm().item() / size
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"
