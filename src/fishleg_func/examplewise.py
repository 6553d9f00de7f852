"""Gradients and Jacobians of single examples, in the parameters, as flat rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from . import _checks
from ._types import Inputs, Params
from .capture import call_model, cloned_buffers, find_ties
from .inverse import InverseFisher
from .kernels import differentiable_kernels
from .likelihoods import Likelihood

_ENTRIES = 2**25  # most entries of the rows that are there at once; 128 MB in float32

Run = Callable[[Params, Inputs], Tensor]


def make_run(model: nn.Module, output: Callable[[Any], Tensor] | None) -> Run:
    """Return ``(params, inputs) -> outputs``, which leaves the model's own tensors alone.

    Args:
        model: Any module, in the mode that it is in.
        output: From what the model returns to one tensor of natural parameters.

    Raises:
        ValueError: If a module makes the outputs of an example depend on the others, or on chance.
    """
    joined = [name for name, m in model.named_modules() if m.training and isinstance(m, (_BatchNorm, _DropoutNd))]
    if joined:
        raise ValueError(
            f"modules {joined} in train mode make an example depend on the others or on chance, and must not where "
            "examples are taken one by one; call model.eval() first"
        )
    ties = find_ties(model)

    def run(params: Params, inputs: Inputs) -> Tensor:
        with differentiable_kernels(model, twice=False):
            out = call_model(model, {**params, **cloned_buffers(model)}, inputs, ties)
        out = out if output is None else output(out)
        _checks.tensor_output(out)
        return out.to(torch.promote_types(out.dtype, torch.float32))  # likelihoods need the digits

    return run


def flat_rows(tree: Params, names: Sequence[str], lead: int) -> Tensor:
    """Return tensors by name, ``[*lead, *shape]``, as rows ``[*lead, P]``."""
    rows = torch.cat([tree[name].flatten(lead) for name in names], -1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def pieces(batch: Any, size: int) -> Iterator[Any]:
    """Cut a batch of tensors, in tuples or dicts or alone, into batches of at most ``size`` examples."""
    leaves, structure = pytree.tree_flatten(batch)
    length = next(len(x) for x in leaves if isinstance(x, Tensor))
    for start in range(0, length, size):
        cut = [x[start : start + size] if isinstance(x, Tensor) else x for x in leaves]
        yield pytree.tree_unflatten(cut, structure)


def _axes(tree: Any) -> Any:
    return pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, tree)


def _alone(tree: Any) -> Any:
    """Make an example a batch of one."""
    return pytree.tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, tree)


def gradient_rows(
    run: Run, likelihood: Likelihood, params: Params, inputs: Inputs, targets: Tensor
) -> Iterator[Tensor]:
    """Yield the gradients of the examples' losses, each summed over its terms, some rows ``[k, P]`` at a time.

    Args:
        run: From :func:`make_run`.
        likelihood: The loss.
        params: Where, and in which parameters.
        inputs: Of a batch.
        targets: Observations.
    """

    def loss(params: Params, inputs: Inputs, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs, targets = run(params, _alone(inputs)), targets.unsqueeze(0)
        return likelihood.nll(outputs, targets), likelihood.weight(outputs.detach(), targets).max()

    gradient = torch.func.grad(loss, has_aux=True)
    size = max(1, _ENTRIES // sum(p.numel() for p in params.values()))
    for x, y in pieces((inputs, targets), size):
        rows, weight = torch.func.vmap(gradient, in_dims=(None, _axes(x), 0))(params, x, y)
        flat = flat_rows(rows, list(params), 1)
        weight = weight.unsqueeze(-1).to(flat.dtype)
        yield torch.where(weight > 0, flat / weight, 0)  # an example that is masked has no terms


def jacobian_rows(run: Run, params: Params, inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs ``[k, D]``, flat for each example, and their Jacobians ``[k, D, P]``.

    Args:
        run: From :func:`make_run`.
        params: Where, and in which parameters.
        inputs: Of a batch.
    """

    def outputs(params: Params, inputs: Inputs) -> tuple[Tensor, Tensor]:
        out = run(params, _alone(inputs)).flatten()
        return out, out

    with torch.no_grad():
        width = run(params, next(pieces(inputs, 1))).numel()
    size = max(1, _ENTRIES // (width * sum(p.numel() for p in params.values())))
    jacobian = torch.func.jacrev(outputs, has_aux=True)
    for x in pieces(inputs, size):
        rows, out = torch.func.vmap(jacobian, in_dims=(None, _axes(x)))(params, x)
        yield out, flat_rows(rows, list(params), 2)


def parameters_of(model: nn.Module, inverse: InverseFisher) -> Params:
    """Return the parameters that Q is about, detached, in its order.

    Raises:
        ValueError: If the model has none of that name and shape.
    """
    own = dict(model.named_parameters())
    wrong = [name for name, shape in inverse.shapes.items() if name not in own or own[name].shape != shape]
    if wrong:
        raise ValueError(f"the model lacks {wrong}, in name or shape, and must be the one that Q was estimated for")
    return {name: own[name].detach() for name in inverse.names}
