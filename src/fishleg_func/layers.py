r"""Layouts: how parameters are packed into one matrix; layer types: how that matrix acts on what the layer sees.

For a layer with parameters packed as U ``[..., m, n]``, inputs are turned into rows a ``[..., rows, n]`` (with a column
of ones for the bias) and gradients at its output into rows δ ``[..., rows, m]``, so that the gradient of U is
:math:`\delta^\top a`, and the output moves by :math:`a V^\top` when U moves by V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._types import LowRank, Packed, Params

__all__ = ["LayerSpec"]


class Layout(ABC):
    """How some parameters of one module are packed into one matrix.

    Attributes:
        names: The parameters, by their names in the module.
        family: Q family that they get by default.
        shape: Packed shape, ``(m, n)`` or ``(groups, m, n)``.
    """

    names: tuple[str, ...]
    family: str = "kfac"
    shape: tuple[int, ...]

    @abstractmethod
    def pack(self, tensors: Params) -> Tensor:
        """Return the packed matrix of the parameters (or of directions in them).

        Args:
            tensors: By their names in the module.

        Returns:
            A tensor of :attr:`shape`.
        """

    @abstractmethod
    def unpack(self, u: Tensor) -> Params:
        """Undo :meth:`pack`.

        Args:
            u: A tensor of :attr:`shape`.

        Returns:
            Tensors by their names in the module.
        """


class Matrix(Layout):
    """A weight and its bias: U = [W | b], shape ``[out, rest + 1]``, a leading axis for groups of outputs.

    Args:
        weight: Gives the shape; its first axis is that of the outputs.
        names: The name of the weight, then of the bias if there is one.
        groups: In how many equal parts the outputs are cut; each has a Q of its own.
    """

    def __init__(self, weight: Tensor, names: tuple[str, ...], groups: int = 1) -> None:
        self.names, self.has_bias = names, len(names) == 2
        self._weight = tuple(weight.shape)
        self._stacked = (groups, len(weight) // groups, weight.numel() // len(weight) + self.has_bias)
        self.shape = self._stacked if groups > 1 else self._stacked[1:]

    def pack(self, tensors: Params) -> Tensor:
        u, *bias = self._parts(tensors)
        return torch.cat((u, *bias), -1).view(self.shape) if bias else u.reshape(self.shape)

    def _parts(self, tensors: Params) -> list[Tensor]:
        """Return weight and bias as columns: "(g o) ... -> g o (...)"."""
        return [tensors[name].reshape(*self._stacked[:2], -1) for name in self.names]

    def times(self, tensors: Params, r: Tensor) -> Tensor:
        u, *bias = self._parts(tensors)
        product = u @ r[: u.shape[-1]]
        return (product + bias[0] * r[-1] if bias else product).view(*self.shape[:-1], -1)

    def unpack(self, u: Tensor) -> Params:
        u = u.view(self._stacked)
        if not self.has_bias:
            return {self.names[0]: u.reshape(self._weight)}
        return {self.names[0]: u[..., :-1].reshape(self._weight), self.names[1]: u[..., -1].reshape(-1)}


class LayerSpec(Layout):
    """How one module packs its trainable parameters; subclass it and call :func:`register_layer` for a new layer type.

    Args:
        module: The layer.
        names: Its trainable parameters, by their names in the module.

    Attributes:
        names: Those names.
        family: Q family that layers of this type get by default.
        shape: Packed shape, ``(m, n)`` or ``(groups, m, n)``.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self.names = names
        self.has_bias = "bias" in names

    @staticmethod
    def covers(names: tuple[str, ...]) -> bool:
        """Tell whether a layer with these trainable parameters can be packed; if not, each is a block of its own.

        Args:
            names: Trainable parameters, by their names in the module.

        Returns:
            By default, whether the weight is trainable.
        """
        return "weight" in names and set(names) <= {"weight", "bias"}

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        """Return what is kept of a call: the x that the other methods get.

        Args:
            args: What the layer was called with, by position.
            kwargs: What it was called with, by keyword.
            out: What it returned.

        Returns:
            By default the first argument.
        """
        x: Tensor = args[0] if args else kwargs["input"]
        return x

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """Return the rows a of an input.

        Args:
            x: What was kept of a call.

        Returns:
            Shape ``[rows, n]`` or ``[groups, rows, n]``, the last column ones where there is a bias.
        """

    @abstractmethod
    def output_rows(self, delta: Tensor) -> Tensor:
        """Return the rows δ of a gradient at the output.

        Args:
            delta: Shaped like the layer's output.

        Returns:
            Shape ``[rows, m]`` or ``[groups, rows, m]``.
        """

    def rows_at(self, x: Tensor, delta: Tensor, chosen: Tensor) -> LowRank:
        """Return some of the rows; by default from all of them.

        Args:
            x: What was kept of a call.
            delta: Gradient at its output.
            chosen: Indices of the rows.

        Returns:
            Those of δ and of a.
        """
        return LowRank(self.output_rows(delta)[..., chosen, :], self.input_rows(x)[..., chosen, :])

    def has_positions(self, x: Tensor) -> bool:
        """Tell whether the first axis of an input is examples, each of which makes several rows.

        Args:
            x: What was kept of a call.

        Returns:
            By default false: no example is ever left out of the statistics.
        """
        return False

    def gradient(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return the packed gradient, dense; by default from the rows.

        Args:
            x: What was kept of a call.
            delta: Gradient at its output.

        Returns:
            A tensor of :attr:`shape`.
        """
        return LowRank(self.output_rows(delta), self.input_rows(x)).dense()

    def times(self, tensors: Params, r: Tensor) -> Tensor:
        """Return the packed matrix of some tensors times a matrix, where that can be had without packing.

        Args:
            tensors: By their names in the module, as for :meth:`pack`.
            r: Shape ``[n, columns]``.

        Returns:
            Shape ``[..., m, columns]``.
        """
        return self.pack(tensors) @ r

    @abstractmethod
    def tangent(self, x: Tensor, v: Packed) -> Tensor:
        """Return how the output moves when the parameters move by ``v``.

        Args:
            x: What was kept of a call.
            v: Packed direction.

        Returns:
            A tensor shaped like the layer's output.
        """


class LinearSpec(Matrix, LayerSpec):
    """``nn.Linear``: U = [W | b], shape ``[out, in + 1]``; any leading dimensions are rows."""

    def __init__(self, module: nn.Linear, names: tuple[str, ...]) -> None:
        Matrix.__init__(self, module.weight, ("weight", "bias")[: len(names)])

    def input_rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # "... n -> (...) n"
        return F.pad(rows, (0, 1), value=1.0) if self.has_bias else rows

    def output_rows(self, delta: Tensor) -> Tensor:
        return delta.reshape(-1, delta.shape[-1])

    def rows_at(self, x: Tensor, delta: Tensor, chosen: Tensor) -> LowRank:
        return LowRank(self.output_rows(delta)[chosen], self.input_rows(x.reshape(-1, x.shape[-1])[chosen]))

    def gradient(self, x: Tensor, delta: Tensor) -> Tensor:
        d = self.output_rows(delta)
        weight = d.mT @ x.reshape(-1, x.shape[-1])
        return torch.cat((weight, d.sum(0).unsqueeze(-1)), -1) if self.has_bias else weight

    def has_positions(self, x: Tensor) -> bool:
        return x.ndim > 2

    def tangent(self, x: Tensor, v: Packed) -> Tensor:
        if isinstance(v, LowRank):
            return self._applied(x, v.a) @ v.d
        return self._applied(x, v)

    def _applied(self, x: Tensor, v: Tensor) -> Tensor:
        """Return what a layer with parameters ``v`` ``[..., in + 1]`` returns: rows are not made, which is a copy."""
        return F.linear(x, v[:, :-1], v[:, -1]) if self.has_bias else F.linear(x, v)
