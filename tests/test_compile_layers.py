"""Layer types in a compiled step: whole graphs that equal eager code, and the ones that torch does not trace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.utils
from cases import randn
from test_compile import largest_difference
from test_low_precision import LABELS, Attending, cnn
from test_packed import Adapted, Bags, Both, Cells, Mean, TiedTable, parametrized
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian, Likelihood

WORDS = torch.arange(24 * 3).square().view(24, 3) % 6
Example = tuple[Callable[[], nn.Module], Tensor, Likelihood, Tensor]

CASES: dict[str, Example] = {
    "attention, norms": (Attending, WORDS, Categorical(), LABELS),
    "transposed convolution": (cnn, randn(24, 1, 4, 4).float(), Categorical(), LABELS),
    "bags, mean": (lambda: Bags("mean"), WORDS, Gaussian(), randn(24, 2).float()),
    "bags, max": (lambda: Bags("max"), WORDS, Gaussian(), randn(24, 2).float()),
    "bilinear": (Both, randn(24, 3).float(), Gaussian(), randn(24, 2, seed=1).float()),
    "cells": (Cells, randn(24, 3, 2).float(), Gaussian(), randn(24, 2, seed=1).float()),
    "adapter": (Adapted, randn(24, 3).float(), Gaussian(), randn(24, 2, seed=1).float()),
    "tied": (TiedTable, WORDS, Gaussian(), randn(24, 3, 6).float()),
    "parametrized": (parametrized, randn(24, 3).float(), Gaussian(), randn(24, 2, seed=1).float()),
    "bfloat16": (lambda: cnn().bfloat16(), randn(24, 1, 4, 4).bfloat16(), Categorical(), LABELS),
}


def compiled(model: nn.Module, likelihood: Likelihood) -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = ff.fishlegify(model, likelihood, update_aux_every=3)
    return torch.compile(step, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", CASES)
def test_a_whole_graph_equals_eager(name: str) -> None:
    make, x, likelihood, y = CASES[name]
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    eager, step = ff.fishlegify(model, likelihood, update_aux_every=3), compiled(twin, likelihood)
    tolerance = 2e-2 if name == "bfloat16" else 1e-5
    for _ in range(7):
        torch.testing.assert_close(step(x, y), eager(x, y), rtol=tolerance, atol=tolerance)
    assert largest_difference(model, twin) <= tolerance
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_torch_does_not_trace_recurrent_layers(kind: type[nn.Module]) -> None:
    model, x = Mean(kind(2, 2, batch_first=True)), randn(24, 3, 2).float()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with pytest.raises(torch._dynamo.exc.Unsupported, match=kind.__name__):
        compiled(model, Gaussian())(x, x[:, 0])
    assert all(torch.equal(before[k], p) for k, p in model.named_parameters())
