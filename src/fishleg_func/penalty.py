"""The quadratic penalty that keeps a model where its loss on earlier data was low."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks
from .examplewise import parameters_of
from .inverse import InverseFisher
from .spectra import rebuilt, spectra
from .transform import unwrapped


class QuadraticPenalty:
    r"""How much worse parameters are than those of an earlier task, to second order.

    .. math:: \tfrac w2\, (\theta - \theta_*)^\top \hat F\, (\theta - \theta_*), \qquad
              \hat F = \max(Q^{-1} - \gamma I, 0) \approx F

    with the maximum over eigenvalues. It is the increase of the mean loss on the task that Q was estimated on, so the
    loss of a new one is added to it; elastic weight consolidation is the case ``q="diagonal"``. Q is inverted in the
    eigenbasis of its family once. The damping is taken out again: directions in which the earlier task has no curvature
    are left free.

    Args:
        model: The model at :math:`\theta_*`; its parameters are copied, and read at every call.
        inverse: Q, estimated there on the earlier task.
        weight: w: for the posterior of both tasks together, the number of earlier examples over that of new ones.

    Raises:
        ValueError: If Q is not about parameters of the model, w is negative, or Q is of a family that has no known
            eigenvectors, and large.

    Example:
        :math:`F + \gamma = 4`, with γ = 1:

        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> Q = ff.InverseFisher.for_model(model, damping=1.0)
        >>> Q.q["(root)"].scale_(0.25)
        >>> penalty = ff.QuadraticPenalty(model, Q)
        >>> model.weight.data.add_(2.0).shape
        torch.Size([1, 1])
        >>> loss = penalty()  # 3 * 2² / 2
        >>> loss.backward()
        >>> round(loss.item(), 4), round(model.weight.grad.item(), 4)
        (6.0, 6.0)

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; Ritter et al., "Online
        structured Laplace approximations for overcoming catastrophic forgetting", NeurIPS 2018.
    """

    def __init__(self, model: nn.Module, inverse: InverseFisher, weight: float = 1.0) -> None:
        _checks.number("weight", weight, 0, float("inf"), "use 1.0")
        self._model, self.weight = unwrapped(model), weight
        self._start = {name: p.clone() for name, p in parameters_of(self._model, inverse).items()}
        self._precision = rebuilt(inverse, spectra(inverse), lambda values: values, 0.0)
        self._roots = {name: tuple(t.detach() for t in q.roots()) for name, q in self._precision.q.items()}

    def __call__(self) -> Tensor:
        """Return the penalty at the model's present parameters.

        Returns:
            A 0-d tensor, to add to a loss.
        """
        moved = {name: self._model.get_parameter(name) - start for name, start in self._start.items()}
        whitened = [
            torch.as_tensor(self._precision.q[b.name].whiten(self._roots[b.name], b.pack(moved))).square().sum()
            for b in self._precision.blocks
        ]
        return self.weight / 2 * torch.stack(whitened).sum()
