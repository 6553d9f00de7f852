"""The Laplace approximation: a Gaussian posterior of the parameters, from Q."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks
from ._linalg import eigh
from ._noise import new_noise
from ._resolve import as_likelihood
from ._types import Inputs, Params
from .capture import kept_random_state
from .examplewise import jacobian_rows, make_run, parameters_of
from .inverse import InverseFisher
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from .spectra import Spectra, rebuilt, spectra
from .transform import unwrapped

METHODS = ("probit", "linear", "network")
_HALVINGS = 60  # of the interval of log τ, 60 wide


class Moments(NamedTuple):
    """Mean and covariance of a model's outputs, those of an example laid flat.

    Attributes:
        mean: Shape ``[N, D]``.
        covariance: Shape ``[N, D, D]``.
    """

    mean: Tensor
    covariance: Tensor


class Laplace:
    r"""A Gaussian posterior of a trained model's parameters.

    .. math:: p(\theta \mid \text{data}) \approx \mathcal{N}\big(\theta_*, (N F + \tau I)^{-1}\big), \qquad
              (N F + \tau I)^{-1} = \tfrac1N (F + \tfrac\tau N I)^{-1} \approx \tfrac1N Q

    N is the number of terms (examples, or unmasked tokens) of the data, τ the precision of a normal prior of mean zero,
    and Q that of a damping :math:`\gamma = \tau / N`: Q says what τ is. The model is taken to be at its most
    probable parameters, those of least mean loss with the penalty :math:`\tfrac\gamma2 \|\theta\|^2`. They are copied;
    parameters that Q is not about count as constants, and must stay, as must buffers.

    Args:
        model: Any module whose outputs for an example do not depend on the others: in eval mode if it has batch norms
            or dropout.
        likelihood: What its outputs are the natural parameters of.
        inverse: Q, of a positive damping.
        batches: The data that the model was trained on, pairs ``(inputs, targets)``, read once.
        output: From what the model returns to one tensor of natural parameters.

    Attributes:
        inverse: Q.
        terms: N.
        prior_precision: τ = N γ.

    Raises:
        ValueError: If Q is not about parameters of the model or has no damping, there is no term in the data, or batch
            norms or dropout are in train mode.
        TypeError: If the likelihood or a batch is not one.

    Example:
        Two observations with F = 1 and a prior of precision 2: the variance is 1 / (2 + 2).

        >>> import torch
        >>> import fishleg_func as ff
        >>> model, x, y = torch.nn.Linear(1, 1, bias=False), torch.ones(2, 1), torch.ones(2, 1)
        >>> Q = ff.InverseFisher.for_model(model, damping=1.0)
        >>> Q.q["(root)"].scale_(0.5)  # what an estimate would come to: 1 / (F + damping)
        >>> posterior = ff.Laplace(model, ff.likelihoods.Gaussian(), Q.to(), [(x, y)])
        >>> posterior.prior_precision, round(posterior.outputs(torch.ones(1, 1)).covariance.item(), 6)
        (2.0, 0.25)

    References:
        MacKay, "A practical Bayesian framework for backpropagation networks", 1992; Daxberger et al., "Laplace redux:
        effortless Bayesian deep learning", NeurIPS 2021; Immer et al., "Improving predictions of Bayesian neural nets
        via local linearization", AISTATS 2021, for ``outputs``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | Any,
        inverse: InverseFisher,
        batches: Iterable[Any],
        *,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        _checks.number("damping", inverse.damping, 0, float("inf"), "it is the prior precision over N", low_open=True)
        self.inverse = inverse
        self._model, self._likelihood = unwrapped(model), as_likelihood(likelihood)
        self._params = {name: p.clone() for name, p in parameters_of(self._model, inverse).items()}
        self._run = make_run(self._model, output)
        self.terms, self._nll = self._read(batches)
        self._parts: Spectra | None = None

    @property
    def prior_precision(self) -> float:
        """Precision τ of the prior."""
        return self.terms * self.inverse.damping

    @torch.no_grad()
    def _read(self, batches: Iterable[Any]) -> tuple[float, float]:
        """Return the number of terms and the sum of their negative log-likelihoods."""
        terms, total = 0.0, 0.0
        for batch in batches:
            inputs, targets = _checks.pair(batch)
            _checks.targets_given(targets)
            with kept_random_state(self._model):
                outputs = self._run(self._params, inputs)
            self._likelihood.check_shapes(outputs, targets)
            number = self._likelihood.terms(outputs.double(), targets)
            if number > 0:
                terms += number
                total += float(self._likelihood.nll(outputs, targets)) * number
        if not terms:
            raise ValueError(f"batches={batches!r} must hold at least one term that is not masked")
        return terms, total

    @torch.no_grad()
    def sample(self, n: int | None = None, generator: torch.Generator | None = None) -> Params:
        """Draw parameters from the posterior.

        Args:
            n: Number of draws; ``None`` for one.
            generator: Source of the draws; by default the library's own, apart from the global stream.

        Returns:
            By name, shaped like the parameters, with a first axis of n draws where n is given:
            ``torch.func.functional_call(model, draw, inputs)`` runs the model with one.

        Raises:
            ValueError: If n < 1.
        """
        drawn = self.inverse.sample(generator, n)
        return {name: p + (drawn[name] / math.sqrt(self.terms)).to(p.dtype) for name, p in self._params.items()}

    @torch.no_grad()
    def outputs(
        self, inputs: Inputs, *, samples: int | None = None, generator: torch.Generator | None = None
    ) -> Moments:
        r"""Return mean and covariance of the outputs (natural parameters).

        .. math:: f \sim \mathcal{N}\big(f(x, \theta_*), \tfrac1N J Q J^\top\big)

        of the model linearized at its parameters; or, with ``samples``, those of that many sampled networks.

        Args:
            inputs: A batch.
            samples: Number of sampled networks, at least 2; ``None`` for the linearized model.
            generator: Source of the draws; by default the library's own.

        Returns:
            A record with ``mean`` ``[N, D]`` and ``covariance`` ``[N, D, D]``.

        Raises:
            ValueError: If ``samples`` < 2.
        """
        with kept_random_state(self._model):
            if samples is None:
                parts = [(f, self._covariance(J)) for f, J in jacobian_rows(self._run, self._params, inputs)]
                return Moments(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
            _checks.integer("samples", samples, 2, "use about 100, or None for the linearized model")
            f = self._sampled(inputs, samples, generator).flatten(2)
        centered = f - f.mean(0)
        return Moments(f.mean(0), torch.einsum("snd,sne->nde", centered, centered) / (samples - 1))

    def _covariance(self, J: Tensor) -> Tensor:
        """Return J Q Jᵀ / N for Jacobians ``[k, D, P]``."""
        product = (self.inverse @ J.flatten(0, 1).mT).mT.view(J.shape)
        covariance = J @ product.mT / self.terms
        return (covariance + covariance.mT) / 2

    def _sampled(self, inputs: Inputs, samples: int, generator: torch.Generator | None) -> Tensor:
        """Return the outputs of sampled networks, ``[samples, N, ...]``."""
        source = generator if generator is not None else new_noise(self.inverse.device).generator()
        return torch.stack([self._run(self.sample(generator=source), inputs) for _ in range(samples)])

    @torch.no_grad()
    def predict(
        self,
        inputs: Inputs,
        *,
        method: str = "probit",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Return the mean of the targets under the posterior: class probabilities, rates, or means.

        With v the variance of an output f, ``"probit"`` is :math:`g(f / \sqrt{1 + \pi v / 8})` for classes, g being the
        softmax or sigmoid; for a Gaussian f itself and for a Poisson :math:`e^{f + v/2}`, both of which are exact.

        Args:
            inputs: A batch.
            method: ``"probit"``, the closed form for the linearized model; ``"linear"``, samples of its outputs; or
                ``"network"``, outputs of sampled networks.
            samples: Number of samples, where there are any.
            generator: Source of the draws; by default the library's own.

        Returns:
            Shaped like the outputs.

        Raises:
            ValueError: If the method is unknown, ``samples`` < 1, or the likelihood is none of this library's.
        """
        _checks.choice("method", method, METHODS)
        _checks.integer("samples", samples, 1, "use about 100")
        if method == "network":
            with kept_random_state(self._model):
                return self._mean(self._sampled(inputs, samples, generator)).mean(0)
        f, covariance = self.outputs(inputs)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        with kept_random_state(self._model):
            shape = self._run(self._params, inputs).shape
        if method == "linear":
            source = generator if generator is not None else new_noise(f.device).generator()
            z = torch.randn(samples, *f.shape, generator=source, dtype=f.dtype, device=f.device)
            drawn = f + torch.einsum("nde,sne->snd", _root(covariance), z)
            return self._mean(drawn.view(samples, *shape)).mean(0)
        if isinstance(self._likelihood, Poisson):
            return (f + variance / 2).exp().view(shape)
        if not isinstance(self._likelihood, Gaussian):
            f = f / (1 + math.pi / 8 * variance).sqrt()
        return self._mean(f.view(shape))

    def _mean(self, f: Tensor) -> Tensor:
        """Return the mean of the targets at natural parameters f."""
        if isinstance(self._likelihood, Categorical):
            return f.softmax(-1)
        if isinstance(self._likelihood, Bernoulli):
            return f.sigmoid()
        if isinstance(self._likelihood, Poisson):
            return f.exp()
        if isinstance(self._likelihood, Gaussian):
            return f
        raise ValueError(
            f"likelihood={self._likelihood!r} must be Gaussian, Bernoulli, Categorical or Poisson for predict(); use "
            "outputs() or sample()"
        )

    def log_marginal_likelihood(self) -> Tensor:
        r"""Return the logarithm of the probability of the data, to compare priors and models by.

        .. math:: \log p(\text{data} \mid \theta_*) - \tfrac\tau2 \|\theta_*\|^2 + \tfrac P2 \log\tau
                  - \tfrac12 \log\det(N F + \tau I)

        Returns:
            A 0-d tensor, float64, in nats.
        """
        size, tau = self.inverse.shape[0], self.prior_precision
        logdet = size * math.log(self.terms) - self.inverse.logdet()
        return -self._nll - tau / 2 * self._squared_norm() + size / 2 * math.log(tau) - logdet / 2

    def _squared_norm(self) -> float:
        return sum(float(p.double().square().sum()) for p in self._params.values())

    def _spectra(self) -> Spectra:
        self._parts = spectra(self.inverse) if self._parts is None else self._parts
        return self._parts

    def with_prior_precision(self, prior_precision: float) -> Laplace:
        r"""Return the posterior under another prior, at the same parameters.

        Each eigenvalue q of Q becomes :math:`1 / (\max(1/q - \gamma, 0) + \tau/N)`, the eigenvectors stay. That is as
        good as Q where the precision rises. Where it falls far, directions count whose curvature is below γ, of which Q
        has not learned much: estimate Q again, at ``damping=prior_precision / N``.

        Args:
            prior_precision: τ > 0.

        Returns:
            A new posterior.

        Raises:
            ValueError: If τ is not positive, or Q is of a family that has no known eigenvectors, and large.
        """
        _checks.number("prior_precision", prior_precision, 0, float("inf"), "use 1.0", low_open=True)
        parts, damping = self._spectra(), prior_precision / self.terms
        other = copy.copy(self)
        other.inverse = rebuilt(self.inverse, parts, lambda values: 1 / (values + damping), damping)
        return other

    def tuned(self) -> Laplace:
        r"""Return the posterior under the prior of greatest marginal likelihood, at the same parameters.

        There :math:`\tau \|\theta_*\|^2 = \sum_i N\lambda_i / (N\lambda_i + \tau)`, the number of parameters that the
        data determine, λ being the eigenvalues of the Fisher that Q has. See :meth:`with_prior_precision` for what
        that is worth.

        Returns:
            A new posterior; its ``prior_precision`` is what was found, within e^±30 of what it was.

        Raises:
            ValueError: If Q is of a family that has no known eigenvectors, and large.
        """
        curvatures = self.terms * torch.cat([part.values.flatten() for part in self._spectra().values()])
        norm, start = self._squared_norm(), math.log(self.prior_precision)
        low, high = start - 30, start + 30
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            tau = math.exp(middle)
            low, high = (middle, high) if tau * norm < float((curvatures / (curvatures + tau)).sum()) else (low, middle)
        return self.with_prior_precision(math.exp((low + high) / 2))


def _root(covariance: Tensor) -> Tensor:
    """Return a root of positive semi-definite matrices, such as those of logits, which may be singular."""
    values, vectors = eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return root
