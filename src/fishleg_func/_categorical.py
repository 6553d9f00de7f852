"""The likelihood of class labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._likelihood import Likelihood
from ._noise import Noise


class Categorical(Likelihood):
    r"""One of C classes with logits f in the last dimension: :math:`-\log p = \log\sum_c e^{f_c} - f_y`.

    Every leading position is a term, except those whose target is ``ignore_index``. ``nll`` is
    ``torch.nn.functional.cross_entropy`` with the same arguments, classes last. With class weights :math:`w` and label
    smoothing ε, the target distribution of a term is :math:`q = (1 - \epsilon) e_y + \epsilon / C`, and

    .. math:: \mathrm{nll} = \frac{\sum_i \sum_c w_c\, q_{ic}\,(-\log p_{ic})}{\sum_i w_{y_i}}, \qquad
              F = \frac{\sum_i (w^\top q_i)\, J_i^\top H_i J_i}{\sum_i w_{y_i}}, \qquad
              H_i = \mathrm{diag}(p_i) - p_i p_i^\top

    so F is that of labels drawn from p, weighted by the observed classes. Without weights, smoothing does not change
    it. Wherever targets are not given, terms have equal weights.

    Args:
        ignore_index: Targets of this value are masked.
        weight: One weight per class, shape ``[C]``, at least one of them positive; ``None`` for equal weights.
        label_smoothing: ε in [0, 1).

    Raises:
        ValueError: If a weight is negative or not finite, all are zero, or there is not one dimension of them; or if
            ``label_smoothing`` is out of its range.
        TypeError: If ``weight`` is not a floating tensor or ``label_smoothing`` not a number.

    Example:
        >>> import math, torch
        >>> f, y = torch.zeros(2, 3, 4), torch.tensor([[0, 1, -100], [2, 3, 3]])
        >>> round(float(Categorical().nll(f, y) / math.log(4)), 6)
        1.0
        >>> Categorical().fisher(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).tolist()
        [[0.25, -0.25]]
        >>> weighted = Categorical(weight=torch.tensor([1.0, 3.0]))
        >>> weighted.weight(torch.zeros(2, 2), torch.tensor([0, 1])).flatten().tolist()
        [0.25, 0.75]
    """

    def __init__(self, ignore_index: int = -100, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        _checks.class_weights(weight)
        _checks.number("label_smoothing", label_smoothing, 0, 1, "use 0 for none, or a small value such as 0.1")
        self.ignore_index, self.class_weights, self.label_smoothing = ignore_index, weight, label_smoothing

    def _weights(self, outputs: Tensor) -> Tensor | None:
        return None if self.class_weights is None else self.class_weights.to(outputs)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # outputs "... c -> (...) c", targets "... -> (...)"
        flat, labels = outputs.flatten(0, -2), targets.flatten().long()
        return F.cross_entropy(
            flat,
            labels,
            weight=self._weights(outputs),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probabilities = outputs.softmax(-1).flatten(0, -2)
        return torch.multinomial(probabilities, 1, generator=generator).view(outputs.shape[:-1])

    def weight(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return outputs.new_full((), outputs.shape[-1] / outputs.numel())
        kept = targets != self.ignore_index
        weights = self._weights(outputs)
        if weights is None:
            numbers = kept.to(outputs.dtype)
            return (numbers / numbers.sum().clamp(min=1)).unsqueeze(-1)
        observed = torch.where(kept, weights[torch.where(kept, targets, 0).long()], 0)
        smoothed = torch.lerp(observed, torch.where(kept, weights.mean(), 0), self.label_smoothing)
        total = observed.sum()
        return (smoothed / torch.where(total > 0, total, 1)).unsqueeze(-1)

    def weight_seen(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        if self.class_weights is None:
            return super().weight_seen(outputs, gradient)
        largest, labels = gradient.abs().max(-1)  # p - onehot is largest at the label
        return self.weight(outputs, torch.where(largest > 0, labels, self.ignore_index))

    def terms(self, outputs: Tensor, targets: Tensor | None = None) -> float:
        weights = self._weights(outputs)
        if targets is None or weights is None:
            return super().terms(outputs, targets)
        kept = targets != self.ignore_index
        return float(torch.where(kept, weights[torch.where(kept, targets, 0).long()], 0).sum())

    def masked(self, sampled: Tensor, targets: Tensor | None) -> Tensor:
        if self.class_weights is not None or self.label_smoothing:
            raise ValueError(
                f"{self!r} must have neither class weights nor label smoothing where targets are sampled: the mean of "
                "its nll over samples has another gradient than zero; use fisher='exact'"
            )
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
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[-1]:
            raise ValueError(
                f"weight has {len(self.class_weights)} entries, and must have one for each of the {outputs.shape[-1]} "
                f"classes in the last dimension of the outputs {tuple(outputs.shape)}"
            )

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        kept, last = targets != self.ignore_index, outputs.shape[-1] - 1
        _checks.in_range("Categorical targets", targets, kept, 0, last, "class numbers, or ignore_index")

    def _arguments(self) -> dict[str, Any]:
        weight = {} if self.class_weights is None else {"weight": self.class_weights}
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return {"ignore_index": self.ignore_index, **weight, **smoothing}
