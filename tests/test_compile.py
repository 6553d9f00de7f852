"""The compiled step: whole graphs, few of them, and the same numbers as in eager code."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

EVERY = 10
GRAPHS = 4  # the first step; then, the step counter being a symbol, plain, auxiliary, and auxiliary with a refresh


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.into(x)))))))


def autoencoder() -> nn.Module:
    sizes = [20, 16, 8, 3, 8, 16, 20]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b), nn.ReLU()] if i not in (2, 5) else [nn.Linear(a, b)]
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    head = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, stride=2)]
    return nn.Sequential(*head, nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))


Case = tuple[Callable[[], nn.Module], Likelihood, tuple[int, ...], Callable[[Tensor], Tensor]]

CASES: dict[str, Case] = {
    "autoencoder": (autoencoder, Bernoulli(), (12, 20), lambda x: x.sigmoid()),
    "cnn with BatchNorm": (cnn, Categorical(), (12, 1, 8, 8), lambda x: x.flatten(1)[:, 0].gt(0).long()),
    "layer called twice": (Twice, Gaussian(), (12, 6), lambda x: x[:, :3].sin()),
    "batch, time, features": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)),
        Categorical(),
        (5, 7, 6),
        lambda x: x[..., 0].gt(0).long(),
    ),
}


def batches(
    shape: tuple[int, ...], target: Callable[[Tensor], Tensor], n: int, lengths: Sequence[int] = ()
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    heads = itertools.cycle(lengths or shape[:1])
    inputs = [torch.randn(next(heads), *shape[1:], generator=generator) for _ in range(n)]
    return [(x, target(x)) for x in inputs]


def largest_difference(one: nn.Module, two: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def run(
    case: Case, backend: str, steps: int, lengths: Sequence[int] = (), compared: int = 2 * EVERY, **options: Any
) -> tuple[float, list[int]]:
    """Train twins, eager and compiled; return their distance after some steps, and the graph count after each step."""
    make, likelihood, shape, target = case
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make()
    twin = copy.deepcopy(model)
    options = {"update_aux_every": EVERY} | options
    eager = ff.fishlegify(model, likelihood, **options)
    step = ff.fishlegify(twin, likelihood, **options)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    counts, difference = [], 0.0
    for i, (x, y) in enumerate(batches(shape, target, steps, lengths)):
        step.hyper.lr.fill_(2e-2 * (1 - i / steps))
        loss = compiled(x, y)
        assert loss.isfinite()
        counts.append(graphs())
        if i < compared:
            eager.hyper.lr.fill_(2e-2 * (1 - i / steps))
            torch.testing.assert_close(eager(x, y), loss, rtol=1e-4, atol=1e-5)
            difference = largest_difference(model, twin)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert step.skipped == 0
    return difference, counts


@pytest.mark.parametrize("name", CASES)
def test_whole_graphs_equal_eager_and_no_recompiles(name: str) -> None:
    difference, counts = run(CASES[name], "aot_eager", 200)
    assert difference <= 1e-5
    assert counts[2 * EVERY - 1 :] == [GRAPHS] * (200 - 2 * EVERY + 1)


OPTIONS: list[dict[str, Any]] = [
    {
        "aux_rule": "adam",
        "aux_lr": 1e-3,
        "u": "momentum",
        "q": {"0": "eigen", "1.weight": "scaled_kronecker", "3": "embedding"},
    },
    {"momentum": "after", "step_norm": None, "fisher": "sampled", "weight_decay": 0.1, "precondition_aux": True},
    {"update_aux_every": 3, "aux_batch_size": 4, "step_norm": "kl", "u": "gaussian", "q": {"0": "dense"}},
    {"update_aux_every": 0, "fisher": "empirical", "q": {"0": "kronecker", "3": "diagonal"}, "exclude": "1"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_compile_too(options: dict[str, Any]) -> None:
    make, _, shape, target = CASES["batch, time, features"]
    difference, counts = run((make, Categorical(), shape, target), "aot_eager", 24, **options)
    assert difference <= 1e-5
    assert max(counts) <= GRAPHS


def test_batches_of_all_lengths_share_graphs() -> None:
    """Statistics at steps 10 (15 rows), 11 (24), 12 (50), 15, 16, 20, where bases are refreshed, and 25 (100)."""
    case, lengths = CASES["layer called twice"], (50, 100, 15, 24)
    difference, counts = run(case, "aot_eager", 32, lengths, compared=32, update_aux_every=None)
    assert difference <= 1e-5
    assert counts[-1] == GRAPHS


@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_only_a_batch_is_new_to_a_graph_on_a_gpu(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    moving: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        tensors = [node for node in inputs if isinstance(node.meta["example_value"], Tensor)]
        moving.append([str(n) for n in tensors if "_dynamo_static_input_type" not in n.meta["tensor_dict"]])
        return graph.forward

    make, _, shape, target = CASES["batch, time, features"]
    step = ff.fishlegify(make(), Gaussian(learn_sigma=True), **options)
    step._keep_in_place()  # which it does on a GPU
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for x, _ in batches(shape, target, 12):
        compiled(x, x[..., :4])
    assert len(moving) >= 2 and all(len(names) == 2 for names in moving), moving  # inputs and targets


@pytest.mark.slow
def test_default_backend_equals_eager() -> None:
    difference, counts = run(CASES["layer called twice"], "inductor", 40)
    assert difference <= 1e-5
    assert counts[-1] == GRAPHS


def test_the_comparison_can_fail() -> None:
    """A twin whose update differs is seen."""
    make, likelihood, shape, target = CASES["layer called twice"]
    model = make()
    twin = copy.deepcopy(model)
    x, y = batches(shape, target, 1)[0]
    ff.fishlegify(model, likelihood)(x, y)
    ff.fishlegify(twin, likelihood, lr=2.1e-2)(x, y)
    assert largest_difference(model, twin) > 1e-5


def test_counting_sees_a_recompile() -> None:
    """A changed dtype costs a graph, and the counter shows it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    double = torch.compile(lambda x: 2 * x, backend="eager")
    double(torch.ones(3))
    before = graphs()
    double(torch.ones(3, dtype=torch.float64))
    assert graphs() == before + 1
