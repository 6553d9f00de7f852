"""Inverses of blocks of the Fisher, against the dense oracle."""

import copy

import pytest
import torch
from cases import assert_close, generator, randn
from test_pruning import CATEGORICAL, GAMMA, batches, mlp
from torch import Tensor, nn

from fishleg_func import pruning, reference


def fisher(model: nn.Module) -> Tensor:
    return reference.fisher(model, torch.cat([x for x, _ in batches()]), "categorical")


@pytest.mark.parametrize("size", [1, 5, 7, None])
@pytest.mark.parametrize("sizes", [(20, 20), (30, 10), (40,)])
def test_block_inverse_is_that_of_blocks_of_the_exact_fisher(size: int | None, sizes: tuple[int, ...]) -> None:
    """A row [w | b] of the first layer has five entries, one of the second seven."""
    model = mlp()
    inverse = pruning.block_inverse(model, CATEGORICAL, batches(sizes), damping=GAMMA, size=size)
    expected = torch.zeros(51, 51, dtype=torch.float64)
    for start, rows, inputs in ((0, 6, 4), (30, 3, 6)):
        weight = start + torch.arange(rows * inputs).view(rows, inputs)
        bias = start + rows * inputs + torch.arange(rows)
        packed = torch.cat([weight, bias[:, None]], 1).flatten()
        for run in packed.split(size or len(packed)):
            block = fisher(model)[run][:, run]
            expected[run[:, None], run] = torch.linalg.inv(block + GAMMA * torch.eye(len(run)).double())
    assert_close(inverse.dense(), expected, 1e-9)
    assert_close(inverse.flatten(inverse.diagonal()), expected.diagonal(), 1e-9)


def test_the_empirical_fisher_is_that_of_gradients_at_the_targets() -> None:
    model = mlp()
    inverse = pruning.block_inverse(model, CATEGORICAL, batches(), damping=GAMMA, size=1, kind="empirical")
    square = torch.zeros(51, dtype=torch.float64)
    for x, y in batches():
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            square += torch.cat([g.flatten() for g in gradient]).square() / 40
    assert_close(inverse.flatten(inverse.diagonal()), 1 / (square + GAMMA), 1e-9)


def test_blocks_refuse_what_they_cannot_use() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="must be given for kind='empirical'"):
        pruning.block_inverse(model, CATEGORICAL, [(batches()[0][0], None)], damping=GAMMA, kind="empirical")
    with pytest.raises(ValueError, match="must yield batches"):
        pruning.block_inverse(model, CATEGORICAL, [], damping=GAMMA)
    with pytest.raises(ValueError, match="size=0 must be an integer >= 1"):
        pruning.block_inverse(model, CATEGORICAL, batches(), damping=GAMMA, size=0)


def test_other_layers_and_evaluation_mode() -> None:
    """Convolutions in groups and a norm: products with whole blocks are those of the exact inverse within layers."""
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    model.eval()
    x, y = randn(10, 2, 3, 3), torch.randint(3, (10,), generator=generator(0))
    inverse = pruning.block_inverse(model, CATEGORICAL, [(x, y)], damping=GAMMA)
    dense, exact = inverse.dense(), reference.fisher(model, x, "categorical")
    for layer in torch.arange(79).split([20, 8, 51]):
        block = exact[layer][:, layer] + GAMMA * torch.eye(len(layer)).double()
        assert_close(dense[layer][:, layer], torch.linalg.inv(block), 1e-9)
        dense[layer[:, None], layer] = 0
    assert float(dense.abs().max()) == 0
    pruned = copy.deepcopy(model)
    done = pruning.prune(pruned, inverse, 0.5)
    assert done.masks.keys() == {"0.weight", "3.weight"}
