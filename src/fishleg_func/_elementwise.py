"""Likelihoods with one natural parameter per target element: Gaussian, Bernoulli, Poisson."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._likelihood import Likelihood
from ._noise import Noise
from ._trees import assign_

_SIGMA_LIMIT = 1.0  # most that log sigma moves in one step, in units of the rate


class Elementwise(Likelihood):
    """What these share: H is diagonal, and elements whose target is ``ignore_value`` are masked.

    An example is a term as long as one of its elements is observed; its negative log-likelihood is the sum over those.

    Args:
        ignore_value: Marks masked elements; ``math.nan`` is allowed, ``None`` masks nothing.

    Raises:
        ValueError: If an observation could have this value.
        TypeError: If it is not a number.
    """

    support: tuple[float, float] | None = None  # of the targets, where it is less than the real line

    def __init__(self, ignore_value: float | None = None) -> None:
        if ignore_value is not None:
            _checks.kind("ignore_value", ignore_value, (int, float), "a number, or None")
            if self.support is not None and self.support[0] <= ignore_value <= self.support[1]:
                low, high = self.support
                raise ValueError(
                    f"ignore_value={ignore_value} must be outside of [{low:g}, {high:g}], where targets are; use -1"
                )
        self.ignore_value = ignore_value

    @abstractmethod
    def energy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood of each element.

        Args:
            outputs: Natural parameters.
            targets: Observations.

        Returns:
            A tensor shaped like ``outputs``.
        """

    @abstractmethod
    def variance(self, outputs: Tensor) -> Tensor:
        """Return h, the Fisher of each element.

        Args:
            outputs: Natural parameters.

        Returns:
            A tensor that broadcasts against ``outputs``.
        """

    def kept(self, targets: Tensor) -> Tensor:
        """Tell which elements are observed.

        Args:
            targets: Observations.

        Returns:
            A bool tensor shaped like ``targets``.
        """
        if self.ignore_value is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return ~targets.isnan() if math.isnan(self.ignore_value) else targets != self.ignore_value

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.ignore_value is None:
            return self.energy(outputs, targets).sum() / outputs.shape[0]
        kept = self.kept(targets)
        energy = self.energy(torch.where(kept, outputs, 0), torch.where(kept, targets, 0))
        return torch.where(kept, energy, 0).sum() / _terms(kept)

    def weight(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or self.ignore_value is None:
            return super().weight(outputs, targets)
        kept = self.kept(targets)
        return kept.to(outputs.dtype) / _terms(kept).clamp(min=1)

    def weight_seen(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        if self.ignore_value is None:
            return self.weight(outputs)
        kept = gradient != 0
        return kept.to(outputs.dtype) / _terms(kept).clamp(min=1)

    def masked(self, sampled: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None or self.ignore_value is None:
            return sampled
        return torch.where(self.kept(targets), sampled, self.ignore_value)

    def score(self, outputs: Tensor, noise: Noise) -> Tensor:
        return self.variance(outputs).sqrt() * noise.rademacher(outputs)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        return self.variance(outputs) * tangent

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        _checks.elementwise_targets(type(self).__name__, outputs, targets)

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        if self.support is not None:
            low, high = self.support
            meant = f"{self.remedy}; the order is nll(outputs, targets)"
            _checks.in_range(f"{type(self).__name__} targets", targets, self.kept(targets), low, high, meant)

    remedy = ""  # what targets outside of the support should be

    def _arguments(self) -> dict[str, Any]:
        return {} if self.ignore_value is None else {"ignore_value": self.ignore_value}


def _terms(kept: Tensor) -> Tensor:
    """Return the number of examples with an observed element, 0-d."""
    return kept.reshape(kept.shape[0], -1).any(1).sum()


class Gaussian(Elementwise):
    r"""Independent normals, :math:`-\log p = \frac{(y - f)^2}{2\sigma^2} + \log\sigma + \frac12 \log 2\pi` per element.

    With ``learn_sigma`` the logarithm of sigma is a parameter of the likelihood, ``log_sigma``: a leaf tensor that
    gets its gradient from ``nll(...).backward()``. Its Fisher is 2 per element of the outputs, and does not couple to
    that of the model, so the natural-gradient step is closed:

    .. math:: \log\sigma \leftarrow \log\sigma - \eta\,\mathrm{clip}_1\Big(\tfrac12\,
              \mathrm{mean}\big(1 - (y - f)^2 / \sigma^2\big)\Big)

    with the mean over the elements that share an entry of sigma. It comes to rest where sigma is the root mean square
    of the residuals.

    Args:
        sigma: Standard deviation, in the units of the targets: a number, or a tensor that broadcasts against the
            outputs, such as ``[D]`` for one per output, or ``[N, 1]`` for one per example of a batch.
        learn_sigma: Whether sigma is learned, from the given value on; then it cannot be one per example.
        ignore_value: Targets of this value are masked.

    Raises:
        ValueError: If sigma is not positive and finite.
        TypeError: If ``ignore_value`` is not a number.

    Example:
        >>> import torch
        >>> f, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
        >>> round(float(Gaussian(sigma=2.0).nll(f, y) - 2 * math.log(2.0) - math.log(2 * math.pi)), 6)
        0.5
        >>> Gaussian(sigma=2.0).fisher(f, torch.ones(1, 2)).tolist()
        [[0.25, 0.25]]
        >>> likelihood = Gaussian(learn_sigma=True)
        >>> for _ in range(50):
        ...     likelihood.learn_(f, y, torch.tensor(0.5))
        >>> round(likelihood.sigma.item() ** 2, 4)  # the mean of 0 and 4
        2.0
    """

    log_sigma: Tensor | None = None

    def __init__(
        self, sigma: float | Tensor = 1.0, learn_sigma: bool = False, ignore_value: float | None = None
    ) -> None:
        super().__init__(ignore_value)
        _checks.positive("sigma", sigma)
        self._given = sigma
        if learn_sigma:
            value = torch.as_tensor(sigma)
            dtype = torch.promote_types(value.dtype, torch.float32)
            self.log_sigma = value.detach().to(dtype).reshape(value.shape or (1,)).log().requires_grad_()

    @property
    def sigma(self) -> float | Tensor:
        """Standard deviation as it is now."""
        return self._given if self.log_sigma is None else self.log_sigma.detach().exp()

    def _sigma(self, outputs: Tensor) -> Tensor:
        """Return sigma for computing with ``outputs``, apart from any graph."""
        return torch.as_tensor(self.sigma, dtype=outputs.dtype, device=outputs.device)

    def energy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        sigma = self._sigma(outputs) if self.log_sigma is None else self.log_sigma.to(outputs).exp()
        constant = sigma.log().expand_as(outputs) + 0.5 * math.log(2 * math.pi)
        return 0.5 * ((targets - outputs) / sigma).square() + constant

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
        return outputs + self._sigma(outputs) * noise

    def variance(self, outputs: Tensor) -> Tensor:
        return self._sigma(outputs).square().reciprocal().expand_as(outputs)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.log_sigma is None else {"log_sigma": self.log_sigma}

    def learn_(self, outputs: Tensor, targets: Tensor, rate: Tensor, ok: Tensor | None = None) -> None:
        if self.log_sigma is None:
            return
        with torch.no_grad():  # as a decorator it could not be compiled where the step makes this object
            weight, kept = self.weight(outputs, targets), self.kept(targets)
            residual = torch.where(kept, targets - outputs, 0) / self._sigma(outputs)
            gradient = (weight * (1 - residual.square())).sum_to_size(self.log_sigma.shape)
            self._descend_(self.log_sigma, gradient, weight.expand_as(outputs), rate, ok)

    @torch.no_grad()
    def learn_from_gradient_(self, outputs: Tensor, rate: Tensor, weight: Tensor | None = None) -> None:
        if self.log_sigma is not None and self.log_sigma.grad is not None:
            weight = (self.weight(outputs) if weight is None else weight).expand_as(outputs)
            self._descend_(self.log_sigma, self.log_sigma.grad, weight, rate, None)

    def _descend_(self, log_sigma: Tensor, gradient: Tensor, weight: Tensor, rate: Tensor, ok: Tensor | None) -> None:
        """Divide a gradient by the Fisher, 2 per element, and step; elements count by their weight in the mean."""
        fisher = 2 * weight.sum_to_size(log_sigma.shape)
        natural = gradient / fisher.clamp(min=torch.finfo(fisher.dtype).tiny)
        move = rate * natural.clamp(-_SIGMA_LIMIT, _SIGMA_LIMIT)
        assign_(log_sigma, log_sigma - move.to(log_sigma), ok)

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        super().check_shapes(outputs, targets)
        shape = torch.as_tensor(self.sigma).shape
        _checks.broadcasts("sigma", shape, outputs.shape)
        if self.log_sigma is not None and len(shape) == outputs.ndim and shape[0] != 1:
            raise ValueError(
                f"sigma of shape {tuple(shape)} has one entry per example of outputs {tuple(outputs.shape)}, and must "
                "not with learn_sigma=True: the next batch has other examples; give one per output, such as "
                "torch.ones(outputs.shape[1:]), or let the model predict it"
            )

    def _arguments(self) -> dict[str, Any]:
        learned = {} if self.log_sigma is None else {"learn_sigma": True}
        return {"sigma": self.sigma, **learned, **super()._arguments()}


class Bernoulli(Elementwise):
    r"""Independent binary targets with logits f: :math:`p = 1 / (1 + e^{-f})`. Targets between 0 and 1 are accepted.

    Args:
        ignore_value: Targets of this value, such as -1, are masked.

    Raises:
        ValueError: If ``ignore_value`` is in [0, 1].
        TypeError: If ``ignore_value`` is not a number.

    Example:
        >>> import torch
        >>> round(float(Bernoulli().nll(torch.zeros(4, 3), torch.ones(4, 3)) / math.log(2)), 6)
        3.0
        >>> Bernoulli().fisher(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
        [[0.25, 0.25]]
    """

    support = (0, 1)
    remedy = "scale them to [0, 1]"

    def energy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def variance(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid()


class Poisson(Elementwise):
    r"""Independent counts with log-rate f: :math:`-\log p = e^f - yf + \log y!` per element.

    Args:
        ignore_value: Targets of this value, such as -1, are masked.

    Raises:
        ValueError: If ``ignore_value`` is not negative.
        TypeError: If ``ignore_value`` is not a number.

    Example:
        >>> import torch
        >>> float(Poisson().nll(torch.zeros(2, 1), torch.ones(2, 1)))
        1.0
        >>> Poisson().fisher(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """

    support = (0, math.inf)
    remedy = "counts"

    def energy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.dtype)
        return outputs.exp() - targets * outputs + torch.lgamma(targets + 1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(outputs.exp(), generator=generator)

    def variance(self, outputs: Tensor) -> Tensor:
        return outputs.exp()
