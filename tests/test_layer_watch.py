"""Gradients in factors: taken from the loop's own passes, and only where their product is what was left in p.grad."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randn
from loops import labels, optimizer_of, parameters
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fishleg_func as ff
from fishleg_func.convolutions import ConvSpec, ConvTransposeSpec
from fishleg_func.layers import LayerSpec, LinearSpec
from fishleg_func.likelihoods import Categorical

BLOCKS = ["0", "2"]  # those with sides that are long beside the rows
ROWS = 8


def wide(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def data(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(ROWS, 40, seed=seed).to(dtype), labels(ROWS, seed=seed)


def loss_of(model: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = data(seed, dtype)
    return Categorical().nll(model(x), y)


def left_in(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def factored(optimizer: ff.FishLeg, model: nn.Module) -> list[str]:
    """Return the blocks whose gradient is known in factors, after a check that these are the gradient."""
    gradients = left_in(model)
    found = optimizer._watch.layers.factors(gradients)
    for block in optimizer.fishleg.plan.blocks:
        if block.name in found:
            truth = block.pack(gradients)
            error = torch.linalg.vector_norm(found[block.name].dense() - truth)
            assert error <= 50 * torch.finfo(truth.dtype).eps * torch.linalg.vector_norm(truth)
    return list(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_found_for_long_sides(dtype: torch.dtype) -> None:
    model = wide(dtype)
    optimizer = optimizer_of(model)
    loss_of(model, 0, dtype).backward()
    assert factored(optimizer, model) == BLOCKS
    optimizer.step()
    assert factored(optimizer, model) == []  # used up
    optimizer.zero_grad()
    loss_of(model, 1, dtype).backward()
    optimizer.zero_grad(set_to_none=False)
    assert factored(optimizer, model) == []  # and dropped with the gradient


def train(model: nn.Module, change: Callable[[nn.Module], Any], *, hooks: bool, **options: Any) -> ff.FishLeg:
    optimizer = optimizer_of(model, **options)
    if not hooks:
        optimizer._watch.layers.remove()
    for i in range(14):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        change(model)
        optimizer.step()
    return optimizer


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda model: None,
    "clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "scaled": lambda model: [p.grad.mul_(1024) for p in model.parameters() if p.grad is not None],
    "by value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-2),
    "decayed": lambda model: [p.grad.add_(p.detach(), alpha=1e-6) for p in model.parameters() if p.grad is not None],
    "one entry": lambda model: model[0].weight.grad[3, 5].add_(1e-6),  # type: ignore[index, union-attr]
    "bias": lambda model: model[2].bias.grad.zero_(),  # type: ignore[index, union-attr]
}
KEPT = {"none": BLOCKS, "clipped": BLOCKS, "scaled": BLOCKS, "one entry": ["2"], "bias": ["0"]}


@pytest.mark.parametrize("change", CHANGES)
def test_the_steps_are_those_of_the_gradient_that_was_left(change: str) -> None:
    mine, other = wide(), wide()
    optimizer = train(mine, CHANGES[change], hooks=True, momentum="before", u="momentum")
    train(other, CHANGES[change], hooks=False, momentum="before", u="momentum")
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-9
    optimizer.zero_grad()
    loss_of(mine, 20).backward()
    CHANGES[change](mine)
    assert factored(optimizer, mine) == KEPT.get(change, [])


def test_it_climbs() -> None:
    mine, other = wide(), wide()
    train(mine, CHANGES["none"], hooks=True, maximize=True)
    train(other, CHANGES["none"], hooks=False, maximize=True)
    assert (parameters(mine) - parameters(other)).abs().max() <= 1e-9
    assert loss_of(mine, 0) > loss_of(wide(), 0)


def test_several_passes_are_joined_while_that_is_cheaper() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    for i in range(2):
        loss_of(model, i).backward()
    assert factored(optimizer, model) == BLOCKS
    for i in range(2, 8):
        loss_of(model, i).backward()
    assert factored(optimizer, model) == []


def test_a_gradient_of_an_earlier_step_that_was_not_zeroed_is_no_product() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    optimizer.step()
    loss_of(model, 1).backward()
    assert factored(optimizer, model) == []


def test_a_graph_that_is_gone_through_twice() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert factored(optimizer, model) == BLOCKS
    optimizer.zero_grad()
    loss.backward()
    assert factored(optimizer, model) == BLOCKS


def test_backward_passes_for_other_ends_show() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    x, y = data(0)
    x.requires_grad_()
    loss = Categorical().nll(model(x), y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    assert factored(optimizer, model) == []


def test_an_input_that_was_overwritten_since_shows() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    x, y = data(0)
    Categorical().nll(model(x), y).backward()
    x.copy_(data(1)[0])
    assert factored(optimizer, model) == ["2"]


def test_one_parameter_of_a_layer_without_gradient() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    model[0].bias.grad = None
    assert factored(optimizer, model) == ["2"]


def test_what_is_recomputed_or_moved_away_is_not_kept() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    x, y = data(0)
    hidden = checkpoint(model[:2], x.requires_grad_(), use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        out = model[2](hidden)
    Categorical().nll(model[3:](out), y).backward()
    assert factored(optimizer, model) == []


def test_under_autocast_nothing_is_kept() -> None:
    model = wide(torch.float32)
    optimizer = optimizer_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, 0, torch.float32)
    loss.backward()
    assert factored(optimizer, model) == []


def test_a_call_without_a_backward_pass_is_let_go_with_its_graph() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    x, _ = data(0)
    seen = StorageWeakRef(x.untyped_storage())
    out = model(x)
    del x
    gc.collect()
    assert not seen.expired()
    del out
    gc.collect()
    assert seen.expired() and optimizer._watch.layers.factors({}) == {}


def test_copies_are_not_watched_and_removal_ends_it() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    twin = copy.deepcopy(model)
    loss_of(twin, 0).backward()
    assert optimizer._watch.layers.factors(left_in(twin)) == {}
    optimizer.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    before = parameters(model)
    loss_of(model, 0).backward()
    model[2].weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="a gradient is NaN or Inf"):
        optimizer.step()
    assert torch.equal(before, parameters(model))


LAYERS: dict[str, tuple[nn.Module, type[LayerSpec]]] = {
    "linear": (nn.Linear(3, 4), LinearSpec),
    "linear without bias": (nn.Linear(3, 4, bias=False), LinearSpec),
    "conv": (nn.Conv2d(4, 6, 3), ConvSpec),
    "groups": (nn.Conv1d(4, 6, 3, groups=2), ConvSpec),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), ConvTransposeSpec),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_without_packing(name: str) -> None:
    module, spec = LAYERS[name]
    tensors = {k: randn(*p.shape, seed=i) for i, (k, p) in enumerate(module.named_parameters())}
    layer = spec(module, tuple(tensors))
    r = randn(layer.shape[-1], 4, seed=9)
    assert torch.allclose(layer.times(tensors, r), layer.pack(tensors) @ r, atol=1e-12)
    assert torch.allclose(LayerSpec.times(layer, tensors, r), layer.pack(tensors) @ r)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e22, 1e30])
def test_gradients_beyond_the_range_of_squares_are_taken_as_they_are(scale: float) -> None:
    model = wide(torch.float32)
    optimizer = optimizer_of(model, q="diagonal", damping=1e-3, update_aux_every=0)
    (scale * loss_of(model, 0, torch.float32)).backward()
    model[0].weight.grad[:24] = 0
    assert "0" not in factored(optimizer, model)


def test_a_gradient_that_cancels_to_rounding_is_taken_as_it_is() -> None:
    model = wide()
    optimizer = optimizer_of(model, weight_decay=0.0)
    x, _ = data(0)
    x[4:] = x[:4]
    weight = torch.tensor([1.0] * 4 + [-1.0] * 4).double()[:, None] * (1 + 1e-15 * torch.arange(8)[:, None])
    (model(x) * weight).sum().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = parameters(model)
    factored(optimizer, model)
    optimizer.step()
    assert torch.equal(before, parameters(model))


def test_nothing_is_kept_once_there_are_too_many_rows() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    batches = [data(i)[0] for i in range(12)]
    seen = [StorageWeakRef(t.untyped_storage()) for t in batches]
    while batches:
        Categorical().nll(model(batches.pop(0)), labels(ROWS)).backward()
    gc.collect()
    assert all(ref.expired() for ref in seen[3:]) and factored(optimizer, model) == []
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    assert factored(optimizer, model) == BLOCKS


def test_batched_backward_passes_and_traces_of_others_work() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    x, _ = data(0)
    jacobian = torch.autograd.functional.jacobian(model, x[:2], vectorize=True)
    assert jacobian.shape == (2, 3, 2, 40)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    loss_of(model, 0).backward()
    assert factored(optimizer, model) == BLOCKS


def test_a_reentrant_checkpoint_is_not_kept() -> None:
    model = wide()
    optimizer = optimizer_of(model)
    x, y = data(0)
    out = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    Categorical().nll(out, y).backward()
    assert factored(optimizer, model) == []
