"""From what users pass as a likelihood, or from targets alone, to a :class:`~fishleg_func.likelihoods.Likelihood`.

And the weight decay that goes with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .likelihoods import Categorical, Gaussian, Likelihood

_CLASSES_DECAY = 0.06  # of weights, where steps have the layer norm

_OPTIONAL = (
    *("fisher", "score", "weight", "masked", "event_dims", "check_shapes", "check_values", "draws"),
    *("tensors", "learn_", "learn_from_gradient_", "weight_seen", "terms"),
)


class _Adapted(Likelihood):
    """Give an object with ``nll`` and ``sample`` the default of everything else."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        for name in _OPTIONAL:
            if hasattr(wrapped, name):
                setattr(self, name, getattr(wrapped, name))

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = self._wrapped.nll(outputs, targets)
        return result

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        result: Tensor = self._wrapped.sample(outputs, generator=generator)
        return result

    def __repr__(self) -> str:
        return repr(self._wrapped)


def as_likelihood(candidate: Any) -> Likelihood:
    """Return ``candidate`` as a :class:`Likelihood`; an object with ``nll`` and ``sample`` is adapted.

    Raises:
        TypeError: If it has neither.
    """
    if isinstance(candidate, Likelihood):
        return candidate
    if (
        not isinstance(candidate, type)
        and callable(getattr(candidate, "nll", None))
        and callable(getattr(candidate, "sample", None))
    ):
        return _Adapted(candidate)
    raise TypeError(
        f"likelihood={candidate!r} must have the methods nll(outputs, targets) and sample(outputs, generator=None); "
        "use an instance such as fishleg_func.likelihoods.Categorical()"
    )


def resolve(outputs: Tensor, targets: Tensor) -> Likelihood:
    """Choose the likelihood that a pair of outputs and targets calls for.

    Returns:
        Categorical for class labels, a unit Gaussian for real targets.

    Raises:
        ValueError: If neither class labels nor real targets shaped like the outputs are seen.
    """
    integral = not targets.dtype.is_floating_point and not targets.dtype.is_complex and targets.dtype != torch.bool
    if integral and targets.shape == outputs.shape[:-1] and outputs.ndim > 1:
        return Categorical()
    if targets.dtype.is_floating_point and targets.shape == outputs.shape:
        return Gaussian(1.0)
    raise ValueError(
        f"likelihood=None cannot be resolved from targets of dtype {targets.dtype} and shape {tuple(targets.shape)} "
        f"with outputs of shape {tuple(outputs.shape)}; pass one of fishleg_func.likelihoods: Gaussian(), Bernoulli(), "
        "Categorical(), Poisson(), or your own"
    )


def usual_weight_decay(step_norm: str | None, likelihood: Likelihood | None) -> float:
    """Return what ``weight_decay=None`` is; NaN where that depends on a likelihood that is not known yet.

    Steps of a given length do not become shorter where the fit becomes certain, and classes are fitted ever better by
    ever larger weights. Likelihoods of one's own have none.
    """
    if step_norm == "layer" and likelihood is None:
        return math.nan
    return _CLASSES_DECAY if step_norm == "layer" and isinstance(likelihood, Categorical) else 0.0
