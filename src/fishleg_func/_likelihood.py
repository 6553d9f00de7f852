"""What a likelihood is: ``nll`` and ``sample``, and the rest that follows from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._noise import Noise, new_noise


class Likelihood(ABC):
    r"""A likelihood :math:`p(y \mid f)` with natural parameters ``outputs``; subclass it for one's own.

    Only :meth:`nll` and :meth:`sample` are needed. The rest has defaults that are right for any likelihood whose terms
    are the entries of the first dimension: :meth:`fisher` is then an unbiased, positive semi-definite Monte-Carlo
    estimate from :attr:`draws` samples per call.

    Attributes:
        draws: Samples per call of the default :meth:`fisher`.

    Example:
        >>> import math, torch
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

    def weight_seen(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Return each term's weight as far as the gradient of the loss at the outputs tells it, in place of targets.

        Args:
            outputs: Natural parameters, shape ``[N, ...]``.
            gradient: Of a multiple of the loss; a term at which it is exactly zero is a masked one.

        Returns:
            As :meth:`weight`.
        """
        dims = self.event_dims(outputs)
        kept = (gradient != 0).any(dims, keepdim=True) if dims else gradient != 0
        return kept.to(outputs.dtype) / kept.sum().clamp(min=1)

    def terms(self, outputs: Tensor, targets: Tensor | None = None) -> float:
        """Return the number of terms that the mean is over, zero where all are masked; reads data.

        Args:
            outputs: Natural parameters, shape ``[N, ...]``.
            targets: Observations, which say what is masked; without them nothing is.

        Returns:
            What :meth:`nll` times it is the sum.
        """
        largest = float(self.weight(outputs, targets).max())
        return 1 / largest if largest > 0 else 0.0

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

    def tensors(self) -> dict[str, Tensor]:
        """Return the likelihood's own parameters, by name: the tensors themselves; by default there are none.

        Returns:
            What a checkpoint must hold.
        """
        return {}

    def learn_(self, outputs: Tensor, targets: Tensor, rate: Tensor, ok: Tensor | None = None) -> None:
        """Take a natural-gradient step in the likelihood's own parameters; by default there are none.

        Args:
            outputs: Natural parameters, shape ``[N, ...]``.
            targets: Observations.
            rate: Step size, 0-d.
            ok: Where given and false, nothing is changed.
        """
        return

    def learn_from_gradient_(self, outputs: Tensor, rate: Tensor, weight: Tensor | None = None) -> None:
        """Take the step of :meth:`learn_` from the ``.grad`` that a backward pass left at :meth:`tensors`.

        Args:
            outputs: Of any batch of the kind that the gradient was taken on; only their shape is read.
            rate: Step size, 0-d.
            weight: Of each element, from :meth:`weight` or :meth:`weight_seen`; without it nothing is masked.
        """
        return

    def __repr__(self) -> str:
        """Return the constructor's call, without arguments that are left at their defaults."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._arguments().items())})"

    def _arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments that are worth naming."""
        return {}
