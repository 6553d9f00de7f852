"""The likelihoods of the original implementation, under the names of its registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from . import _checks
from ._categorical import Categorical
from ._elementwise import Bernoulli, Gaussian, Poisson
from ._likelihood import Likelihood

__all__ = ["FISH_LIKELIHOODS"]

Device = torch.device | str | None


class _Original(Likelihood):
    """What the original's likelihoods have besides, ``draw`` and being called; the order of arguments is checked."""

    symmetric = False  # whether nll(outputs, targets) is nll(targets, outputs)

    def draw(self, outputs: Tensor) -> Tensor:
        """Draw targets, as ``sample`` does."""
        return self.sample(outputs)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood."""
        return self.nll(outputs, targets)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self.symmetric and targets.requires_grad and not outputs.requires_grad:
            raise ValueError(
                "the targets require a gradient and the outputs do not: the order must be nll(outputs, targets); swap "
                "the arguments"
            )
        if not torch.compiler.is_compiling():
            self.check_shapes(outputs, targets)
            self.check_values(outputs, targets)
        return super().nll(outputs, targets)  # type: ignore[safe-super]


class FixedGaussianLikelihood(_Original, Gaussian):
    """Sigma is as given."""

    symmetric = True

    def __init__(self, sigma: float | Tensor = 1.0, device: Device = None) -> None:
        super().__init__(sigma.to(device) if isinstance(sigma, Tensor) else sigma)


class GaussianLikelihood(_Original, Gaussian):
    """Sigma is learned."""

    symmetric = True

    def __init__(self, sigma: float | Tensor = 1.0, device: Device = None) -> None:
        super().__init__(torch.as_tensor(sigma, device=device), learn_sigma=True)


class BernoulliLikelihood(_Original, Bernoulli):
    """Logits."""

    def __init__(self, device: Device = None) -> None:
        super().__init__()


class PoissonLikelihood(_Original, Poisson):
    """Log-rates; the original has none."""

    def __init__(self, device: Device = None) -> None:
        super().__init__()


class _OneHot(Categorical):
    """Takes class labels, or one-hot targets of the shape of the outputs."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().nll(outputs, _labels(outputs, targets))

    def weight(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().weight(outputs, None if targets is None else _labels(outputs, targets))

    def masked(self, sampled: Tensor, targets: Tensor | None) -> Tensor:
        given = targets is not None and targets.shape == sampled.shape  # one-hot targets mask nothing
        return super().masked(sampled, targets if given else None)

    def check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        super().check_shapes(outputs, _labels(outputs, targets))

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape == outputs.shape:
            _checks.one_hot(targets)
        super().check_values(outputs, _labels(outputs, targets))


def _labels(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets.argmax(-1) if targets.shape == outputs.shape else targets


class SoftMaxLikelihood(_Original, _OneHot):
    """Class labels or one-hot targets, classes in the last dimension; ``draw`` gives labels."""

    def __init__(self, device: Device = None) -> None:
        super().__init__()


class _CaseFolded(Mapping[str, Callable[..., Likelihood]]):
    """A mapping whose keys are in lower case, and looked up in any."""

    def __init__(self, entries: dict[str, Callable[..., Likelihood]]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Callable[..., Likelihood]:
        try:
            return self._entries[name.casefold()]
        except (KeyError, AttributeError):
            raise KeyError(f"likelihood {name!r} must be one of {', '.join(map(repr, self._entries))}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


FISH_LIKELIHOODS: Mapping[str, Callable[..., Likelihood]] = _CaseFolded(
    {
        "fixedgaussian": FixedGaussianLikelihood,
        "gaussian": GaussianLikelihood,
        "bernoulli": BernoulliLikelihood,
        "softmax": SoftMaxLikelihood,
        "poisson": PoissonLikelihood,
    }
)
"""The original's likelihoods by name, in any case: ``FISH_LIKELIHOODS["FixedGaussian"](sigma=1.0, device=device)``.

``"fixedgaussian"`` and ``"gaussian"`` (sigma learned) take ``sigma=``, and all take ``device=``, where sigma is put.
Each is a :class:`~fishleg_func.likelihoods.Likelihood` that can be called, has ``draw`` for ``sample``, and refuses
``nll(targets, outputs)`` where the two can be told apart. ``"softmax"`` takes class labels and one-hot targets.
"""
