"""Likelihoods: negative log-likelihood, samples, and the Fisher of the outputs.

The model's outputs are the natural parameters of a likelihood p(y given f). A likelihood is a mean over *terms*
(examples, or unmasked tokens), each summed over its event dimensions. Four are built in; one's own needs only ``nll``
and ``sample``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._noise import Noise, new_noise

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson"]


class Likelihood(ABC):
    r"""A likelihood :math:`p(y \mid f)` with natural parameters ``outputs``; subclass it for one's own.

    Only :meth:`nll` and :meth:`sample` are needed. The rest has defaults that are right for any likelihood whose terms
    are the entries of the first dimension: :meth:`fisher` is then an unbiased, positive semi-definite Monte-Carlo
    estimate from :attr:`draws` samples per call.

    Attributes:
        draws: Samples per call of the default :meth:`fisher`.

    Example:
        >>> import torch
        >>> class Laplace(Likelihood):
        ...     def nll(self, outputs, targets):
        ...         return (outputs - targets).abs().flatten(1).sum(1).mean() + outputs[0].numel() * math.log(2)
        ...
        ...     def sample(self, outputs, generator=None):
        ...         u = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype) - 0.5
        ...         return outputs - u.sign() * (1 - 2 * u.abs()).log()
        >>> f = torch.zeros(3, 1)
        >>> Laplace().fisher(f, torch.ones(3, 1)).flatten().tolist()  # the score is a sign: its square is one
        [1.0, 1.0, 1.0]
    """

    draws: int = 32

    @abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""Return :math:`-\log p(y \mid f)`, summed over event dimensions, averaged over terms.

        Args:
            outputs: Natural parameters f, shape ``[N, ...]``.
            targets: Observations y.

        Returns:
            A 0-d tensor, in nats per term.
        """

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw targets from :math:`p(y \mid f)`.

        Args:
            outputs: Natural parameters f, shape ``[N, ...]``.
            generator: Source of the draws; the global stream when ``None``.

        Returns:
            Targets of the shape and dtype that :meth:`nll` takes.
        """

    def weight(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return each term's weight in the mean: one over the number of terms, zero for masked ones.

        Args:
            outputs: Natural parameters, shape ``[N, ...]``.
            targets: Observations, which say what is masked; without them nothing is.

        Returns:
            A tensor that broadcasts against ``outputs``.
        """
        return outputs.new_full((), 1 / outputs.shape[0])

    def masked(self, sampled: Tensor, targets: Tensor | None) -> Tensor:
        """Return sampled targets with the mask of the observed ones; by default there is none.

        Args:
            sampled: From :meth:`sample`.
            targets: Observations, or ``None``.

        Returns:
            Targets that :meth:`nll` takes.
        """
        return sampled

    def event_dims(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the dimensions of ``outputs`` that belong to one term; by default all but the first.

        Args:
            outputs: Natural parameters, shape ``[N, ...]``.

        Returns:
            Positive dimension numbers.
        """
        return tuple(range(1, outputs.ndim))

    def term_inner(self, s: Tensor, t: Tensor) -> Tensor:
        r"""Return :math:`s_i^\top t_i` for each term i.

        Args:
            s: A tensor shaped like the outputs.
            t: Another.

        Returns:
            The inner products, event dimensions kept with size one.
        """
        dims = self.event_dims(s)
        return (s * t).sum(dims, keepdim=True) if dims else s * t

    def score(self, outputs: Tensor, noise: Noise) -> Tensor:
        r"""Draw z with mean zero and :math:`E[z_i z_i^\top] = H_i`, independent between terms.

        The default is the gradient of the negative log-likelihood at sampled targets.

        Args:
            outputs: Natural parameters, shape ``[N, ...]``.
            noise: Source of the draws: ``noise.rademacher(outputs)`` gives signs, ``noise.generator()`` a generator.

        Returns:
            A tensor shaped like ``outputs``.
        """
        targets = self.sample(outputs, noise.generator())
        gradient: Callable[..., Tensor] = torch.func.grad(self.nll)
        return gradient(outputs, targets) / self.weight(outputs)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        r"""Apply the Fisher of the outputs, :math:`H_i = E_y[\nabla_f \log p \, \nabla_f \log p^\top]`, term by term.

        Args:
            outputs: Natural parameters f, shape ``[N, ...]``.
            tangent: The vector t, shaped like ``outputs``.

        Returns:
            H t, shaped like ``outputs``; not weighted by the number of terms.
        """
        return self._estimated_fisher(outputs, tangent, new_noise(outputs.device))

    def _estimated_fisher(self, outputs: Tensor, tangent: Tensor, noise: Noise) -> Tensor:
        product = torch.zeros_like(outputs)
        for draw in range(self.draws):
            score = self.score(outputs, noise.fork(draw))
            product = product + score * self.term_inner(score, tangent)
        return product / self.draws

    def make_fisher(self, outputs: Tensor, noise: Noise) -> Callable[[Tensor], Tensor]:
        r"""Return :math:`t \mapsto Ht`, :meth:`fisher` at these outputs, its draws, if any, taken from ``noise``.

        Args:
            outputs: Natural parameters f, shape ``[N, ...]``.
            noise: Source of the draws.

        Returns:
            A function of a tensor shaped like ``outputs``.
        """
        if getattr(self.fisher, "__func__", None) is Likelihood.fisher:
            return lambda tangent: self._estimated_fisher(outputs, tangent, noise)
        return lambda tangent: self.fisher(outputs, tangent)

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ``ValueError`` or ``TypeError`` where shapes or dtypes cannot be of this likelihood.

        Args:
            outputs: Natural parameters.
            targets: Observations.
        """
        return

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ``ValueError`` where targets are outside of the likelihood's support; reads data, so eager only.

        Args:
            outputs: Natural parameters.
            targets: Observations.
        """
        return

    def __repr__(self) -> str:
        """Return the constructor's call."""
        return f"{type(self).__name__}()"


class _Elementwise(Likelihood):
    """What the likelihoods with one natural parameter per target element share: H is diagonal, with entries h."""

    @abstractmethod
    def variance(self, outputs: Tensor) -> Tensor:
        """Return h, the Fisher of each element, in a shape that broadcasts against ``outputs``."""

    def score(self, outputs: Tensor, noise: Noise) -> Tensor:
        return self.variance(outputs).sqrt() * noise.rademacher(outputs)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        return self.variance(outputs) * tangent

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        _checks.elementwise_targets(type(self).__name__, outputs, targets)

    def _mean(self, elements: Tensor) -> Tensor:
        return elements.sum() / elements.shape[0]


class Gaussian(_Elementwise):
    r"""Independent normals, :math:`-\log p = \frac{(y - f)^2}{2\sigma^2} + \log\sigma + \frac12 \log 2\pi` per element.

    Args:
        sigma: Standard deviation, in the units of the targets: a number, or a tensor that broadcasts against the
            outputs.

    Raises:
        ValueError: If sigma is not positive and finite.

    Example:
        >>> import torch
        >>> f, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
        >>> round(float(Gaussian(sigma=2.0).nll(f, y) - 2 * math.log(2.0) - math.log(2 * math.pi)), 6)
        0.5
        >>> Gaussian(sigma=2.0).fisher(f, torch.ones(1, 2)).tolist()
        [[0.25, 0.25]]
    """

    def __init__(self, sigma: float | Tensor = 1.0) -> None:
        _checks.positive("sigma", sigma)
        self.sigma = sigma

    def _sigma(self, outputs: Tensor) -> Tensor:
        return torch.as_tensor(self.sigma, dtype=outputs.dtype, device=outputs.device)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        sigma = self._sigma(outputs)
        residual = (targets - outputs) / sigma
        constant = sigma.log().expand_as(outputs) + 0.5 * math.log(2 * math.pi)
        return self._mean(0.5 * residual.square() + constant)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
        return outputs + self._sigma(outputs) * noise

    def variance(self, outputs: Tensor) -> Tensor:
        return self._sigma(outputs).square().reciprocal().expand_as(outputs)

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        super().check_shapes(outputs, targets)
        _checks.broadcasts("sigma", torch.as_tensor(self.sigma).shape, outputs.shape)

    def __repr__(self) -> str:
        return f"Gaussian(sigma={self.sigma})"


class Bernoulli(_Elementwise):
    r"""Independent binary targets with logits f: :math:`p = 1 / (1 + e^{-f})`. Targets between 0 and 1 are accepted.

    Example:
        >>> import torch
        >>> round(float(Bernoulli().nll(torch.zeros(4, 3), torch.ones(4, 3)) / math.log(2)), 6)
        3.0
        >>> Bernoulli().fisher(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
        [[0.25, 0.25]]
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._mean(F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none"))

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def variance(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid()

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        _checks.in_range("Bernoulli targets", targets, 0, 1, "scale them to [0, 1]; the order is nll(outputs, targets)")


class Poisson(_Elementwise):
    r"""Independent counts with log-rate f: :math:`-\log p = e^f - yf + \log y!` per element.

    Example:
        >>> import torch
        >>> float(Poisson().nll(torch.zeros(2, 1), torch.ones(2, 1)))
        1.0
        >>> Poisson().fisher(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.dtype)
        return self._mean(outputs.exp() - targets * outputs + torch.lgamma(targets + 1))

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(outputs.exp(), generator=generator)

    def variance(self, outputs: Tensor) -> Tensor:
        return outputs.exp()

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        _checks.in_range("Poisson targets", targets, 0, math.inf, "counts; the order is nll(outputs, targets)")


class Categorical(Likelihood):
    r"""One of C classes with logits f in the last dimension: :math:`-\log p = \log\sum_c e^{f_c} - f_y`.

    Every leading position is a term, except those whose target is ``ignore_index``.

    Args:
        ignore_index: Targets of this value are masked.

    Example:
        >>> import torch
        >>> f, y = torch.zeros(2, 3, 4), torch.tensor([[0, 1, -100], [2, 3, 3]])
        >>> round(float(Categorical().nll(f, y) / math.log(4)), 6)
        1.0
        >>> Categorical().fisher(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).tolist()
        [[0.25, -0.25]]
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # outputs "... c -> (...) c", targets "... -> (...)"
        flat, labels = outputs.flatten(0, -2), targets.flatten().long()
        return F.cross_entropy(flat, labels, ignore_index=self.ignore_index)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probabilities = outputs.softmax(-1).flatten(0, -2)
        return torch.multinomial(probabilities, 1, generator=generator).view(outputs.shape[:-1])

    def weight(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return outputs.new_full((), outputs.shape[-1] / outputs.numel())
        kept = (targets != self.ignore_index).to(outputs.dtype)
        return (kept / kept.sum().clamp(min=1)).unsqueeze(-1)

    def masked(self, sampled: Tensor, targets: Tensor | None) -> Tensor:
        if bool((sampled == self.ignore_index).any()):
            raise ValueError(
                f"ignore_index={self.ignore_index} must be none of the classes where targets are sampled: such samples "
                "would mask themselves; use -100"
            )
        return sampled if targets is None else torch.where(targets == self.ignore_index, self.ignore_index, sampled)

    def event_dims(self, outputs: Tensor) -> tuple[int, ...]:
        return (outputs.ndim - 1,)

    def score(self, outputs: Tensor, noise: Noise) -> Tensor:
        p = outputs.softmax(-1)
        root = p.sqrt() * noise.rademacher(outputs)
        return root - p * root.sum(-1, keepdim=True)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        weighted = p * tangent
        return weighted - p * weighted.sum(-1, keepdim=True)

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        _checks.class_labels(outputs, targets)

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        labels = targets[targets != self.ignore_index]
        _checks.in_range("Categorical targets", labels, 0, outputs.shape[-1] - 1, "class numbers, or ignore_index")

    def __repr__(self) -> str:
        return f"Categorical(ignore_index={self.ignore_index})"
