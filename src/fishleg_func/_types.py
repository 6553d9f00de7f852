"""Aliases and small immutable records shared by every other file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters, gradients or directions by qualified name."""

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
"""What a model is called with: one tensor, positional arguments, or keyword arguments; or a :class:`Call`."""


class Call(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Inputs) -> Call:
        """Return inputs as the arguments of a call."""
        if isinstance(inputs, dict):
            return cls((), inputs)
        return cls(inputs if isinstance(inputs, tuple) else (inputs,), {})


class LowRank(NamedTuple):
    r"""A packed matrix kept as its factors, :math:`U = d^\top a`.

    Attributes:
        d: Left factor, shape ``[..., rows, m]``.
        a: Right factor, shape ``[..., rows, n]``.
    """

    d: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """Multiply the factors out to shape ``[..., m, n]``."""
        return self.d.mT @ self.a


class Symmetrized(NamedTuple):
    r"""A symmetric matrix kept as its factors, :math:`G = x^\top y + y^\top x`.

    Attributes:
        x: Shape ``[..., rows, n]``.
        y: Shape ``[..., rows, n]``.
        raw: x over y before they were whitened, ``[..., 2 rows, n]``.
    """

    x: Tensor
    y: Tensor
    raw: Tensor

    def dense(self) -> Tensor:
        """Multiply the factors out to shape ``[..., n, n]``."""
        half = self.x.mT @ self.y
        return half + half.mT


class Shift(NamedTuple):
    r"""A change of a matrix from the right, :math:`K \to K(I + x^\top y)`.

    Attributes:
        x: Shape ``[..., rows, n]``.
        y: Shape ``[..., rows, n]``.
    """

    x: Tensor
    y: Tensor


Packed = Tensor | LowRank
"""A layer's parameters, or a direction in them, as one matrix: dense ``[..., m, n]`` or factored."""


class Slot(NamedTuple):
    """What one call of a layer returns in the discovery pass: enough to allocate its probe."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """Return zeros of this shape, dtype and device: one number, seen everywhere, not to be written to."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


class Linearization(NamedTuple):
    r"""A model linearized at its parameters, :math:`f(\theta + v) \approx f(\theta) + Jv`.

    Attributes:
        outputs: Natural parameters of the likelihood, shape ``[N, ...]``.
        pullback: :math:`c \mapsto J^\top c`, from the shape of ``outputs`` to parameter space.
        pushforward: :math:`v \mapsto Jv`, from parameter space to the shape of ``outputs``.
        buffers: The model's buffers after this forward pass; the model's own are untouched.
        shared: The pullback again, whose pass back the next pushforward may make use of.
    """

    outputs: Tensor
    pullback: Callable[[Tensor], Any]
    pushforward: Callable[..., Tensor]
    buffers: Params
    shared: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Options:
    """What is fixed for the life of a step, so that compiled code may depend on it; see ``fishlegify``."""

    momentum: str
    update_aux_every: int | None
    aux_rule: str
    precondition_aux: bool
    aux_batch_size: int | None
    fisher: str
    u: str
    step_norm: str | None
    warmup_rank: int


@dataclass(eq=False)
class Hyper:
    """Hyperparameters as 0-d tensors: ``hyper.lr.fill_(1e-3)`` takes effect at the next step and never recompiles.

    Attributes:
        lr: Learning rate η.
        damping: The fixed part of γ, in the units of the Fisher.
        relative_damping: The part of γ that follows the outputs: a multiple of the mean of their Fisher's diagonal.
        aux_lr: Rate of the auxiliary update of λ.
        weight_decay: Decoupled: parameters shrink by ``lr * weight_decay`` at every step. NaN where it is to suit a
            likelihood that is not known yet.
        beta: Decay of the momentum.
        kl_clip: Bound on the predicted KL divergence of a step, used with ``step_norm="kl"``.
    """

    lr: Tensor
    damping: Tensor
    relative_damping: Tensor
    aux_lr: Tensor
    weight_decay: Tensor
    beta: Tensor
    kl_clip: Tensor

    def __setattr__(self, name: str, value: Tensor) -> None:
        """Set each once: later the number changes in place, where compiled code and λ's rule see it."""
        if name in vars(self) or name not in self.__dataclass_fields__:
            known = ", ".join(self.__dataclass_fields__)
            raise AttributeError(f"hyper.{name} = {value!r} must be hyper.NAME.fill_(value), NAME one of {known}")
        super().__setattr__(name, value)


@dataclass(eq=False)
class Groups:
    """Hyperparameters by group of parameters; one group, unless an optimizer has more.

    Attributes:
        hypers: Of each group.
        of_block: Number of a block's group, which gives β and γ.
        of_parameter: Number of a parameter's group, which gives η and the weight decay.
    """

    hypers: list[Hyper]
    of_block: dict[str, int]
    of_parameter: dict[str, int]

    def beta(self, block: str) -> Tensor:
        """Return the decay of a block's momentum, 0-d."""
        return self.hypers[self.of_block[block]].beta

    def from_beta(self, function: Callable[[Tensor], Tensor], blocks: Iterable[str]) -> dict[str, Tensor]:
        """Return a function of β by block, 0-d, called once for each group."""
        values = [function(hyper.beta) for hyper in self.hypers]
        return {block: values[self.of_block[block]] for block in blocks}


class Accuracy(NamedTuple):
    r"""Relative residual :math:`\|(F + \gamma I)Qu - u\| / \|u\|` of Q on fresh probes.

    Attributes:
        overall: Over all parameters together.
        layers: Per block, by name.
    """

    overall: float
    layers: dict[str, float]
