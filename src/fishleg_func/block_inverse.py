"""Inverses of diagonal blocks of the Fisher, computed and not learned: what Q is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import _checks
from ._noise import Noise, new_noise
from ._resolve import as_likelihood
from ._types import Inputs, Params
from ._widened import wide, widened
from .blocks import Block
from .capture import call_model, cloned_buffers, find_ties
from .fisher import make_output_fisher
from .inverse import covered
from .likelihoods import Likelihood
from .operators import Operator
from .transform import make_plan, unwrapped

KINDS = ("exact", "empirical")


class BlockInverse(Operator):
    r"""A block-diagonal inverse: one dense matrix for each run of entries of a layer.

    .. math:: Q = \mathrm{diag}(Q_1, \dots, Q_K)

    The entries of a layer are those of its packed matrix :math:`[W \mid b]`, row by row, so that a block as long as a
    row is one output with its bias. Come by one through :func:`block_inverse` or :func:`magnitude`.

    Args:
        blocks: How the parameters of each layer are packed.
        inverses: Matrices of each layer, ``[count, size, size]``, by name; the last may reach beyond the layer's end.
        params: The parameters in the order of the flat vectors; only looked at.
        damping: γ, in the units of the Fisher.

    Attributes:
        names: Qualified names of the parameters, in the order of the flat vectors.
        shapes: Shape of each, by name.
        shape: ``(P, P)``.
        damping: γ.
    """

    def __init__(self, blocks: Sequence[Block], inverses: Mapping[str, Tensor], params: Params, damping: float) -> None:
        super().__init__(params, damping)
        self._blocks, self._inverses = tuple(blocks), dict(inverses)

    def _products(self, v: Params) -> Params:
        product: Params = {}
        for block in self._blocks:
            inverse = self._inverses[block.name]
            rows = cut(torch.func.vmap(block.pack)(v), inverse.shape[-1])
            product |= self._joined(block, torch.einsum("kbj,bij->kbi", rows, inverse))
        return product

    def _joined(self, block: Block, rows: Tensor) -> Params:
        """Undo :func:`cut` and the packing: ``[k, blocks, size]`` to parameters ``[k, *shape]``."""
        return self._unpacked(block, rows.flatten(1)[:, : math.prod(block.shape)].view(-1, *block.shape))

    @torch.no_grad()
    def diagonal(self) -> Params:
        """Return the diagonal of Q.

        Returns:
            By name, shaped like the parameters.
        """
        by_name: Params = {}
        for block in self._blocks:
            rows = self._inverses[block.name].diagonal(dim1=-2, dim2=-1).unsqueeze(0)
            by_name |= self._joined(block, rows)
        return {name: by_name[name].squeeze(0) for name in self.names}


def cut(u: Tensor, size: int) -> Tensor:
    """Cut packed matrices ``[k, *packed shape]`` into runs ``[k, blocks, size]``, the last filled up with zeros."""
    flat = u.flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % size)).view(len(flat), -1, size)


def magnitude(model: nn.Module) -> BlockInverse:
    """Return the identity as an inverse Fisher, under which a weight's saliency is half its square.

    Args:
        model: The model; only looked at.

    Returns:
        The operator; nothing is compensated for under it.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> op = ff.pruning.magnitude(torch.nn.Linear(2, 1))
        >>> op @ torch.tensor([1.0, 2.0, 3.0])
        tensor([1., 2., 3.])
    """
    blocks, params = _plan(model, None, None)
    ones = {b.name: torch.ones(math.prod(b.shape), 1, 1, dtype=b.dtype, device=_device(b, params)) for b in blocks}
    return BlockInverse(blocks, ones, params, 0.0)


@torch.no_grad()
def block_inverse(
    model: nn.Module,
    likelihood: Likelihood | Any,
    loader: Iterable[Any],
    *,
    damping: float,
    size: int | None = None,
    kind: str = "exact",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> BlockInverse:
    r"""Compute the inverse of diagonal blocks of the Fisher of a data set.

    .. math:: Q_k = (F_{kk} + \gamma I)^{-1}, \qquad F_{kk} = \frac{1}{M} \sum_{t=1}^M J_{tk}^\top H_t J_{tk}

    with the mean over the M examples (or unmasked tokens) of each batch, and over batches by their number of examples.
    Jacobians are taken example by example, of all parameters at once: memory grows with the entries of a batch's
    outputs times P. Nothing of the model is changed.

    Args:
        model: A module whose examples do not depend on each other: in eval mode where there is BatchNorm or dropout.
        likelihood: What its outputs are the natural parameters of.
        loader: Pairs ``(inputs, targets)``; targets may be ``None`` with ``kind="exact"``.
        damping: γ, in the units of the Fisher.
        size: Entries of a block: 1 for the diagonal, ``None`` for one block for each layer.
        kind: ``"exact"``; or ``"empirical"``, the mean of :math:`gg^\top` with the gradients at the targets.
        include: Glob patterns on parameter or module names: it is about these.
        exclude: Glob patterns: it is not about these.
        output: From what the model returns to one tensor of natural parameters.

    Returns:
        The operator.

    Raises:
        TypeError: If the likelihood or a batch is not one.
        ValueError: If an argument is out of its range, the loader is empty, or targets are needed and missing.

    Example:
        The Fisher of a linear model under a unit Gaussian is that of its inputs, here 3:

        >>> import torch
        >>> import fishleg_func as ff
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.full((4, 1), 3.0**0.5)
        >>> op = ff.pruning.block_inverse(model, ff.likelihoods.Gaussian(), [(x, None)], damping=1.0)
        >>> round(op.dense().item(), 4)  # 1 / (3 + 1)
        0.25

    References:
        Hassibi & Stork (1993), "Second order derivatives for network pruning: Optimal Brain Surgeon"; Singh & Alistarh
        (2020), "WoodFisher: efficient second-order approximation for neural network compression", for blocks.
    """
    _checks.choice("kind", kind, KINDS)
    _checks.number("damping", damping, 0, float("inf"), "use a small value such as 1e-3", low_open=True)
    if size is not None:
        _checks.integer("size", size, 1, "use 1 for the diagonal, None for whole layers")
    model, likelihood = unwrapped(model), as_likelihood(likelihood)
    blocks, params = _plan(model, include, exclude)
    lengths = {b.name: math.prod(b.shape) if size is None else min(size, math.prod(b.shape)) for b in blocks}
    sums: Params = {}
    count = 0
    for batch in loader:
        inputs, targets = _checks.pair(batch)
        if targets is None and kind == "empirical":
            raise ValueError("targets=None must be given for kind='empirical'; pass them, or use kind='exact'")
        jacobian = _jacobian(model, inputs, params, output)
        roots, n = _roots(model, likelihood, inputs, targets, kind, output)
        for block in blocks:
            rows = torch.func.vmap(torch.func.vmap(block.pack))({k: jacobian[k] for k in block.names.values()})
            z = torch.einsum("nrd,nd...->nr...", roots.to(block.dtype), rows).flatten(0, 1)
            runs = cut(z, lengths[block.name]).movedim(1, 0)  # "(n r) b s -> b (n r) s"
            gram = n * (runs.mT @ runs)
            sums[block.name] = sums[block.name] + gram if block.name in sums else gram
        count += n
    if not count:
        raise ValueError(f"loader={loader!r} must yield batches")
    return BlockInverse(blocks, {k: _inverse(s / count, damping) for k, s in sums.items()}, params, damping)


def _plan(
    model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[tuple[Block, ...], Params]:
    model = unwrapped(model)
    blocks = make_plan(model, "diagonal", include, exclude).blocks
    return blocks, {name: p.to(wide(p.dtype)) for name, p in covered(model, blocks).items()}


def _device(block: Block, params: Params) -> torch.device:
    return params[next(iter(block.names.values()))].device


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * eye))


def _run(model: nn.Module, inputs: Inputs, params: Params, output: Callable[[Any], Tensor] | None) -> Tensor:
    with widened(model):
        out = call_model(model, {**params, **cloned_buffers(model)}, inputs, find_ties(model))
        out = out if output is None else output(out)
    _checks.tensor_output(out)
    return out


def _jacobian(model: nn.Module, inputs: Inputs, params: Params, output: Callable[[Any], Tensor] | None) -> Params:
    """Return the Jacobian of each example's outputs, by parameter: ``[N, D, *shape]``."""

    def of_one(example: Inputs) -> Params:
        alone = pytree.tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, example)
        jacobian: Params = torch.func.jacrev(lambda p: _run(model, alone, p, output).flatten())(params)
        return jacobian

    axes = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, inputs)
    jacobian: Params = torch.func.vmap(of_one, in_dims=(axes,))(inputs)
    return jacobian


def _roots(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Inputs,
    targets: Tensor | None,
    kind: str,
    output: Callable[[Any], Tensor] | None,
) -> tuple[Tensor, int]:
    """Return R of each example with RᵀR the Fisher of its outputs, ``[N, D, D]``, and the number of examples."""
    outputs = _run(model, inputs, {}, output)
    if targets is not None:
        likelihood.check_shapes(outputs, targets)
    noise: Noise = new_noise(outputs.device)
    weight = likelihood.weight(outputs, targets)
    output_fisher = make_output_fisher(kind, likelihood, outputs, weight, targets, noise)
    d = outputs[0].numel()
    basis = torch.eye(d, dtype=outputs.dtype, device=outputs.device).view(d, 1, *outputs.shape[1:])
    columns = [output_fisher(e.expand_as(outputs)).flatten(1) for e in basis]
    matrix = torch.stack(columns, -1)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT, len(outputs)
