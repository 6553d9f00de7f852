r"""Pruning with an inverse Fisher: which weights to remove, and how the others make up for them.

The loss near a trained model is :math:`\tfrac12 \delta^\top Q^{-1} \delta`, with :math:`Q \approx (F + \gamma I)^{-1}`.
Removing the weights S costs least if the others move too:

.. math:: \delta = \arg\min_{\delta_S = -w_S} \tfrac12 \delta^\top Q^{-1} \delta = -Q_{:S} \, (Q_{SS})^{-1} w_S .

For one weight this is the optimal brain surgeon: :math:`\delta = -w_i Q e_i / Q_{ii}` at a cost of
:math:`w_i^2 / 2 Q_{ii}`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _checks, selection
from ._types import Params
from .block_inverse import BlockInverse, block_inverse, magnitude
from .conjugate import conjugate_gradients
from .inverse import InverseFisher
from .masks import attach, detach
from .selection import Structure, cubic_schedule
from .transform import unwrapped

__all__ = [
    "BlockInverse",
    "Pruning",
    "attach",
    "block_inverse",
    "compensation",
    "cubic_schedule",
    "detach",
    "magnitude",
    "prune",
    "prune_gradually",
    "saliency",
]

Inverse = InverseFisher | BlockInverse

_MAX_ITERATIONS = 2000


class Pruning(NamedTuple):
    r"""What :func:`prune` did.

    Attributes:
        masks: Bool, by parameter name, shaped like it: true where the weight stays.
        sparsity: Fraction of the weights in ``masks`` that are removed.
        increase: :math:`\tfrac12 \delta^\top Q^{-1} \delta`, the increase of the loss that Q predicts.
        residual: Relative residual of the system solved for the compensation, at most ``tol`` if that was reached.
    """

    masks: Params
    sparsity: float
    increase: float
    residual: float


@torch.no_grad()
def saliency(model: nn.Module, inverse: Inverse) -> Params:
    r"""Return what removing each weight alone costs, :math:`w_i^2 / 2 Q_{ii}`, the others making up for it.

    Args:
        model: The model.
        inverse: The inverse Fisher, learned or computed.

    Returns:
        By name, shaped like the parameters that the inverse is about.

    Raises:
        ValueError: If the inverse is about other parameters.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> ff.pruning.saliency(model, ff.InverseFisher.for_model(model))["weight"].item()  # Q = I: 2^2 / 2
        2.0
    """
    params, diagonal = _weights(model, inverse), inverse.diagonal()
    return {name: params[name].square() / (2 * diagonal[name]) for name in inverse.names}


@torch.no_grad()
def compensation(model: nn.Module, inverse: Inverse, masks: Mapping[str, Tensor], *, tol: float = 1e-4) -> Params:
    r"""Return the change of all parameters that removes the masked weights at the least cost.

    .. math:: \delta = -Q_{:S} \, (Q_{SS})^{-1} w_S

    the minimizer of :math:`\tfrac12 \delta^\top Q^{-1} \delta` with :math:`\delta_S = -w_S`, for all of S at once. The
    system is solved by conjugate gradients on products with Q.

    Args:
        model: The model, which is not changed.
        inverse: The inverse Fisher, learned or computed.
        masks: By parameter name, false (or zero) where a weight is removed.
        tol: On the relative residual of the system.

    Returns:
        By name, shaped like the parameters that the inverse is about.

    Raises:
        ValueError: If the inverse is about other parameters, or a mask does not fit.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model, masks = torch.nn.Linear(2, 1, bias=False), {"weight": torch.tensor([[True, False]])}
        >>> _ = model.weight.data.fill_(2.0)
        >>> q = ff.InverseFisher.for_model(model, q="dense")
        >>> _ = q.load_state_dict({"(root).L": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "damping": 1.0})
        >>> ff.pruning.compensation(model, q, masks)["weight"].tolist()  # Q = [[1, 1], [1, 2]]
        [[-1.0, -2.0]]
    """
    _checks.number("tol", tol, 0, 1, "use 1e-4", low_open=True)
    weights = inverse.flatten(_weights(model, inverse))
    removed = _removed(inverse, _kept(inverse, masks))
    delta, _, _ = _compensated(inverse, inverse.flatten(inverse.diagonal()), weights, removed, tol)
    return inverse.unflatten(delta)


@torch.no_grad()
def prune(
    model: nn.Module,
    inverse: Inverse,
    sparsity: float,
    *,
    masks: Mapping[str, Tensor] | None = None,
    structure: Structure = "weight",
    scope: str = "global",
    rounds: int = 1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    tol: float = 1e-4,
) -> Pruning:
    r"""Remove weights of the least saliency, and move the others to make up for them, in place.

    In each round the weights of the least :math:`w_i^2 / 2 Q_{ii}` are removed, and all others (biases too) moved to
    the minimum of :math:`\tfrac12 \delta^\top Q^{-1} \delta` for all that was removed so far: see
    :func:`compensation`, which is exact for this Q. What is approximate is the choice: :math:`Q_{ii}` does not know
    what else is removed. With more rounds, fewer are chosen at once, from weights that have made up for those before.

    All is computed in float32, or wider where a parameter is; weights of lower precision are rounded once, at the end.

    Args:
        model: The model; its removed weights are zero afterwards, and stay so only where :func:`attach` holds them.
        inverse: The inverse Fisher: learned, :func:`block_inverse`, or :func:`magnitude`.
        sparsity: Fraction of the weights to have removed in the end, in (0, 1), with those in ``masks``.
        masks: From an earlier call: what is removed stays so.
        structure: ``"weight"``, each on its own; a number of inputs that are next to each other; or ``"channel"``, all
            of one index along the first axis. A group's saliency is the sum of its weights', and those of the least per
            weight are removed.
        scope: ``"global"``, weights of all layers compared with each other; or ``"layer"``, the same fraction of each
            parameter.
        rounds: Steps to the sparsity, on :func:`cubic_schedule`.
        include: Glob patterns of the parameters to prune; ``None`` for all. Those of one dimension are not pruned.
        exclude: Glob patterns of parameters that are not pruned, though they may make up for others.
        tol: On the relative residual of the compensation.

    Returns:
        A record with the masks, the sparsity reached, the predicted increase of the loss, and the residual.

    Raises:
        ValueError: If an argument is out of its range or does not fit the model; nothing is changed.
        FloatingPointError: If the compensation is not finite, or not in a parameter's dtype; nothing is changed.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> model.weight.data = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
        >>> ff.pruning.prune(model, ff.pruning.magnitude(model), 0.5).increase  # (1^2 + 2^2) / 2
        2.5
        >>> model.weight.tolist()
        [[0.0, -4.0, 3.0, 0.0]]

    References:
        McGowan et al., "Efficient model compression techniques with FishLeg", arXiv 2412.02328; Hassibi & Stork (1993),
        "Second order derivatives for network pruning: Optimal Brain Surgeon".
    """
    _checks.number("sparsity", sparsity, 0, 1, "use a fraction such as 0.9", low_open=True)
    _checks.number("tol", tol, 0, 1, "use 1e-4", low_open=True)
    _checks.integer("rounds", rounds, 1, "use 1 for one shot")
    _checks.choice("scope", scope, ("global", "layer"))
    params, names = _weights(model, inverse), selection.chosen(inverse.shapes, include, exclude)
    sizes = {name: selection.group_size(name, inverse.shapes[name], structure) for name in names}
    kept = _kept(inverse, masks or {})
    start = _sparsity(kept, names)
    if sparsity < start:
        raise ValueError(f"sparsity={sparsity!r} must be >= {start:.4g}, which masks have removed; raise it")
    scopes = [names] if scope == "global" else [[name] for name in names]
    diagonal, original = inverse.flatten(inverse.diagonal()), inverse.flatten(params)
    weights, increase, residual = original, 0.0, 0.0
    for fraction in cubic_schedule(start, sparsity, rounds):
        scores = inverse.unflatten(weights.square() / (2 * diagonal))
        for members in scopes:
            selection.choose_(kept, scores, {name: sizes[name] for name in members}, fraction)
        delta, increase, residual = _compensated(inverse, diagonal, original, _removed(inverse, kept), tol)
        weights = original + delta
    rounded = {name: w.to(params[name].dtype) for name, w in inverse.unflatten(weights).items()}
    for name, w in rounded.items():
        if not w.isfinite().all():
            largest = float(torch.linalg.vector_norm(weights, torch.inf))
            raise FloatingPointError(
                f"weights of up to {largest:.3g} in {name!r} must be finite in {w.dtype}; nothing was changed. Raise "
                "the damping of the inverse, or prune the model in float32"
            )
    for name, w in rounded.items():
        params[name].copy_(w)
    given = {name: kept[name] for name in kept if name in names or name in (masks or {})}
    return Pruning(given, _sparsity(kept, names), increase, residual)


def prune_gradually(
    model: nn.Module,
    sparsities: Iterable[float],
    refine: Callable[[Inverse | None], Inverse],
    train: Callable[[float], object],
    *,
    structure: Structure = "weight",
    scope: str = "global",
    rounds: int = 1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    tol: float = 1e-4,
) -> Pruning:
    """Prune in steps, with training in between that keeps what is removed at zero.

    Args:
        model: The model.
        sparsities: Rising fractions, such as those of :func:`cubic_schedule`.
        refine: From the inverse of the step before (at first ``None``) to that of the model as it is now, such as
            :func:`fishleg_func.estimate_inverse_fisher` with the ``state`` of the one before.
        train: Called with the sparsity reached, to train the model, whose masks are attached meanwhile.
        structure: As in :func:`prune`.
        scope: As in :func:`prune`.
        rounds: As in :func:`prune`, at each step.
        include: As in :func:`prune`.
        exclude: As in :func:`prune`.
        tol: As in :func:`prune`.

    Returns:
        The record of the last step.

    Raises:
        ValueError: If there are no sparsities, they fall, or an argument of :func:`prune` is wrong.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(8, 1)
        >>> steps = ff.pruning.cubic_schedule(0.0, 0.75, 2)
        >>> done = ff.pruning.prune_gradually(model, steps, lambda _: ff.pruning.magnitude(model), print)
        0.65625
        0.75
        >>> int(model.weight.count_nonzero())
        2
    """
    masks: Params | None = None
    inverse: Inverse | None = None
    done: Pruning | None = None
    for sparsity in sparsities:
        inverse = refine(inverse)
        done = prune(
            model, inverse, sparsity, masks=masks, structure=structure, scope=scope, rounds=rounds,
            include=include, exclude=exclude, tol=tol,
        )  # fmt: skip
        masks = done.masks
        attach(model, masks)
        try:
            train(sparsity)
        finally:
            detach(model, masks)
    if done is None:
        raise ValueError(f"sparsities={sparsities!r} must hold at least one; use cubic_schedule(0.0, 0.9, 10)")
    return done


def _weights(model: nn.Module, inverse: Inverse) -> Params:
    """Return the parameters that an inverse is about, themselves."""
    params = {name: p.detach() for name, p in unwrapped(model).named_parameters()}
    _checks.about(inverse.shapes, params)
    return {name: params[name] for name in inverse.names}


def _kept(inverse: Inverse, masks: Mapping[str, Tensor]) -> Params:
    """Return new masks for all parameters of an inverse."""
    _checks.masks(masks, inverse.shapes)
    ones = {name: torch.ones(shape, dtype=torch.bool, device=inverse.device) for name, shape in inverse.shapes.items()}
    return {name: one & (masks[name] != 0).to(one.device) if name in masks else one for name, one in ones.items()}


def _removed(inverse: Inverse, kept: Params) -> Tensor:
    """Return flat what masks remove."""
    return inverse.flatten({name: (~mask).to(inverse.dtype) for name, mask in kept.items()}) != 0


def _sparsity(kept: Params, names: Sequence[str]) -> float:
    """Return the fraction of some parameters that masks remove."""
    return 1 - sum(int(kept[n].count_nonzero()) for n in names) / sum(kept[n].numel() for n in names)


def _compensated(
    inverse: Inverse, diagonal: Tensor, weights: Tensor, removed: Tensor, tol: float
) -> tuple[Tensor, float, float]:
    """Return δ, its cost, and the relative residual of its system, all flat."""

    def multiply(v: Tensor) -> Tensor:
        product: Tensor = inverse @ v
        return product * removed

    b = weights * removed
    solution, _, residual = conjugate_gradients(multiply, b, lambda r: r / diagonal, tol, _MAX_ITERATIONS)
    if not math.isfinite(residual):
        raise FloatingPointError(
            f"the compensation has a residual of {residual}, and must have a finite one; nothing was changed. "
            "Look for parameters, or entries of the inverse, that are not finite"
        )
    if residual > tol:
        warnings.warn(
            f"the compensation has a residual of {residual:.2g} after {_MAX_ITERATIONS} iterations, and must have one "
            f"<= {tol:.2g}; raise the damping of the inverse, or tol",
            RuntimeWarning,
            stacklevel=3,
        )
    moved: Tensor = inverse @ solution
    return torch.where(removed, -weights, -moved), float(b @ solution) / 2, residual
