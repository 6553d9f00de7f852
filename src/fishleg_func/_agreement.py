"""Whether a loss function is the negative log-likelihood that curvature is taken of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._elementwise import Gaussian
from ._likelihood import Likelihood

_MOST_TOLERANCE = 0.05  # however coarse the dtype


def check_loss(
    likelihood: Likelihood, loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> None:
    r"""Raise unless a loss function has the gradient of the likelihood at the outputs of a batch.

    .. math:: \nabla_f\, \mathrm{loss}(f, y) = \nabla_f\, \mathrm{nll}(f, y)

    Where the two differ, gradient and Fisher are of different objectives, and steps of a natural gradient are wrong by
    the factor between them. Constants, which do not move the gradient, may differ.

    Args:
        likelihood: What the outputs are the natural parameters of.
        loss_fn: From outputs and targets to a 0-d tensor, such as ``torch.nn.MSELoss()``.
        outputs: Natural parameters of a batch, shape ``[N, ...]``, in which N and the size of an example differ.
        targets: Observations.

    Raises:
        ValueError: If the gradients differ, with the factor between them where it is a constant, and what gives it;
            or if nothing can be told, both being zero or one not finite.
        TypeError: If the loss is not a 0-d tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fishleg_func.likelihoods import Gaussian, check_loss
        >>> f, y = torch.randn(4, 10), torch.randn(4, 10)
        >>> check_loss(Gaussian(), lambda f, y: (f - y).square().sum() / (2 * len(f)), f, y)
        >>> check_loss(Gaussian(), nn.MSELoss(), f, y)
        Traceback (most recent call last):
        ...
        ValueError: the gradient of the loss is 1/5 of that of Gaussian(sigma=1.0), and must be equal: the loss averages
        over the 10 elements of an example, and must sum over them, and leaves out the factor 1 / (2 sigma^2); multiply
        the loss by 5, or use Gaussian(sigma=2.23607)
    """
    likelihood.check_shapes(outputs, targets)
    likelihood.check_values(outputs, targets)
    ours, theirs = _gradient(likelihood.nll, outputs, targets), _gradient(loss_fn, outputs, targets)
    size, other = torch.linalg.vector_norm(ours), torch.linalg.vector_norm(theirs)
    if not bool(size > 0) or not bool(other > 0) or not bool((size + other).isfinite()):
        raise ValueError(
            f"the gradients at the outputs have norms {size:g} (of {likelihood!r}) and {other:g} (of the loss), and "
            "must be finite and not zero; pass outputs of an untrained model, and a loss that depends on them"
        )
    tolerance = min(100 * torch.finfo(ours.dtype).eps ** 0.75, _MOST_TOLERANCE)
    factor = float((ours * theirs).sum() / size.square())
    if float(torch.linalg.vector_norm(theirs - factor * ours) / other) > tolerance:
        cosine = factor * float(size / other)
        raise ValueError(
            f"the gradient of the loss is not that of {likelihood!r}, nor a multiple of it (cosine {cosine:.3f}), and "
            "must be; pass the likelihood that the loss is the negative logarithm of: Gaussian for squared errors, "
            "Bernoulli for BCEWithLogitsLoss, Categorical for CrossEntropyLoss, with its weight, ignore_index and "
            "label_smoothing, Poisson for PoissonNLLLoss"
        )
    if abs(factor - 1) > tolerance:
        raise ValueError(
            f"the gradient of the loss is {_fraction(factor)} that of {likelihood!r}, and must be equal"
            f"{_cause(likelihood, outputs, factor, tolerance)}; multiply the loss by {1 / factor:g}"
            f"{_equivalent(likelihood, factor)}"
        )


def _gradient(loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        loss = loss_fn(leaf, targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise TypeError(
                f"the loss is a {type(loss).__name__}{shape}, and must be a 0-d tensor; use reduction='mean' or 'sum'"
            )
        if not loss.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(loss, leaf, materialize_grads=True)[0]


def _fraction(factor: float) -> str:
    inverse = 1 / factor
    whole = round(inverse)
    return f"1/{whole} of" if whole > 1 and math.isclose(inverse, whole, rel_tol=1e-3) else f"{factor:g} times"


def _causes(likelihood: Likelihood, outputs: Tensor) -> Iterator[tuple[float, str]]:
    """Yield common mistakes: the factor that each makes, and its name."""
    terms = round(1 / float(likelihood.weight(outputs).max()))
    elements = outputs.numel() // outputs.shape[0]
    reductions = [
        (1.0, ""),
        (float(terms), f"sums over the {terms} terms of the batch, and must average over them"),
        (1 / elements, f"averages over the {elements} elements of an example, and must sum over them"),
        (terms / outputs.shape[0], f"averages over the {outputs.shape[0]} examples only, and must over all terms"),
    ]
    doubled = []
    if isinstance(likelihood, Gaussian) and torch.as_tensor(likelihood.sigma).numel() == 1:
        squared = float(torch.as_tensor(likelihood.sigma)) ** 2
        doubled = [
            (2 * squared, "leaves out the factor 1 / (2 sigma^2)"),
            (squared, "leaves out the factor 1 / sigma^2"),
        ]
    for factor, words in reductions:
        for scale, also in [(1.0, ""), *doubled]:
            yield factor * scale, ", and ".join(part for part in (words, also) if part)


def _cause(likelihood: Likelihood, outputs: Tensor, factor: float, tolerance: float) -> str:
    for expected, words in _causes(likelihood, outputs):
        if math.isclose(factor, expected, rel_tol=10 * tolerance) and words:
            return f": the loss {words}"
    return ""


def _equivalent(likelihood: Likelihood, factor: float) -> str:
    """Name the Gaussian whose negative log-likelihood has the gradient of the loss."""
    sigma = torch.as_tensor(likelihood.sigma) if isinstance(likelihood, Gaussian) else torch.empty(0)
    if factor <= 0 or sigma.numel() != 1 or likelihood.tensors():
        return ""
    return f", or use Gaussian(sigma={float(sigma) / factor**0.5:g})"
