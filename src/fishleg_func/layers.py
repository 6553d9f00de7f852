r"""Layer types: how each packs its parameters into one matrix, and how that matrix acts on what the layer sees.

All weight layouts are here. For a layer with parameters packed as U ``[..., m, n]``, inputs are turned into rows a
``[..., rows, n]`` (with a column of ones for the bias) and gradients at its output into rows δ ``[..., rows, m]``, so
that the gradient of U is :math:`\delta^\top a`, and the output moves by :math:`a V^\top` when U moves by V.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ._trees import dense
from ._types import LowRank, Packed, Params

__all__ = ["LayerSpec", "register_layer"]


class LayerSpec(ABC):
    """How one module packs its trainable parameters; subclass it and call :func:`register_layer` for a new layer type.

    Args:
        module: The layer.
        names: Its trainable parameters, by their names in the module.

    Attributes:
        family: Q family that layers of this type get by default.
        shape: Packed shape, ``(m, n)`` or ``(groups, m, n)``.
    """

    family: str = "kfac"
    shape: tuple[int, ...]

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

    @abstractmethod
    def pack(self, tensors: Params) -> Tensor:
        """Return the packed matrix of the layer's parameters (or of directions in them).

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

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """Return the rows a of an input.

        Args:
            x: What the layer was called with.

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

    def has_positions(self, x: Tensor) -> bool:
        """Tell whether the first axis of an input is examples, each of which makes several rows.

        Args:
            x: What the layer was called with.

        Returns:
            By default false: no example is ever left out of the statistics.
        """
        return False

    def gradient(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return the packed gradient, dense; by default from the rows.

        Args:
            x: What the layer was called with.
            delta: Gradient at its output.

        Returns:
            A tensor of :attr:`shape`.
        """
        return LowRank(self.output_rows(delta), self.input_rows(x)).dense()

    @abstractmethod
    def tangent(self, x: Tensor, v: Packed) -> Tensor:
        """Return how the output moves when the parameters move by ``v``.

        Args:
            x: What the layer was called with.
            v: Packed direction.

        Returns:
            A tensor shaped like the layer's output.
        """


class LinearSpec(LayerSpec):
    """``nn.Linear``: U = [W | b], shape ``[out, in + 1]``; any leading dimensions are rows."""

    def __init__(self, module: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        self.shape = (module.out_features, module.in_features + self.has_bias)

    def pack(self, tensors: Params) -> Tensor:
        if not self.has_bias:
            return tensors["weight"]
        return torch.cat((tensors["weight"], tensors["bias"].unsqueeze(-1)), -1)

    def unpack(self, u: Tensor) -> Params:
        return {"weight": u[:, :-1], "bias": u[:, -1]} if self.has_bias else {"weight": u}

    def input_rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # "... n -> (...) n"
        return F.pad(rows, (0, 1), value=1.0) if self.has_bias else rows

    def output_rows(self, delta: Tensor) -> Tensor:
        return delta.reshape(-1, delta.shape[-1])

    def has_positions(self, x: Tensor) -> bool:
        return x.ndim > 2

    def tangent(self, x: Tensor, v: Packed) -> Tensor:
        rows = self.input_rows(x)
        moved = (rows @ v.a.mT) @ v.d if isinstance(v, LowRank) else rows @ v.mT
        return moved.view(*x.shape[:-1], self.shape[0])


class ConvSpec(LayerSpec):
    """``nn.Conv1d``, ``Conv2d``, ``Conv3d``: U = [W | b], shape ``[out, in * kernel + 1]``, a leading axis for groups.

    Every output position is a row.
    """

    def __init__(self, module: nn.modules.conv._ConvNd, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        self.kernel: tuple[int, ...] = tuple(module.kernel_size)
        self.stride, self.dilation, self.groups = tuple(module.stride), tuple(module.dilation), module.groups
        self.pad_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        self.pad = self._padding(module)
        self.inputs = module.in_channels // module.groups
        m, n = module.out_channels // module.groups, self.inputs * math.prod(self.kernel) + self.has_bias
        self.shape = (m, n) if self.groups == 1 else (self.groups, m, n)
        self.convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]

    def _padding(self, module: nn.modules.conv._ConvNd) -> tuple[int, ...]:
        """Return the amounts for ``F.pad``: last axis first, before and after each axis."""
        if module.padding == "valid":
            return (0,) * (2 * len(self.kernel))
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            pairs = [(t // 2, t - t // 2) for t in totals]
        else:
            pairs = [(int(p), int(p)) for p in module.padding]
        return tuple(amount for pair in reversed(pairs) for amount in pair)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad, mode=self.pad_mode) if any(self.pad) else x

    def _batched(self, x: Tensor) -> Tensor:
        """Give an input without batch dimension one."""
        return x if x.ndim == len(self.kernel) + 2 else x.unsqueeze(0)

    def pack(self, tensors: Params) -> Tensor:
        u = rearrange(tensors["weight"], "(g o) i ... -> g o i (...)", g=self.groups).flatten(2)
        if self.has_bias:
            u = torch.cat((u, rearrange(tensors["bias"], "(g o) -> g o 1", g=self.groups)), -1)
        return u.view(self.shape)

    def unpack(self, u: Tensor) -> Params:
        u = u.view(self.groups, -1, self.shape[-1])
        if not self.has_bias:
            return {"weight": u.reshape(-1, self.inputs, *self.kernel)}
        return {"weight": u[..., :-1].reshape(-1, self.inputs, *self.kernel), "bias": u[..., -1].reshape(-1)}

    def input_rows(self, x: Tensor) -> Tensor:
        x = self._padded(self._batched(x))
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, d * (k - 1) + 1, s)[
                ..., ::d
            ]  # patches appended as last axes, one for each kernel axis
        spatial = len(self.kernel)
        x = x.view(x.shape[0], self.groups, self.inputs, *x.shape[2:]).movedim(
            1, 0
        )  # b (g i) ... -> g b i *positions *kernel
        rows = x.movedim(2, 2 + spatial).flatten(2 + spatial).flatten(1, 1 + spatial)  # -> g (b positions) (i kernel)
        rows = F.pad(rows, (0, 1), value=1.0) if self.has_bias else rows
        return rows.view(*self.shape[:-2], -1, self.shape[-1])

    def output_rows(self, delta: Tensor) -> Tensor:
        delta = self._batched(delta)
        delta = delta.reshape(delta.shape[0], self.groups, -1, *delta.shape[2:])  # b (g o) ... -> g (b positions) o
        rows = delta.movedim((1, 2), (0, -1)).flatten(1, -2)
        return rows.reshape(*self.shape[:-2], -1, self.shape[-2])

    def has_positions(self, x: Tensor) -> bool:
        return x.ndim == len(self.kernel) + 2

    def gradient(self, x: Tensor, delta: Tensor) -> Tensor:
        x, delta = self._padded(self._batched(x)), self._batched(delta)
        weight = x.new_empty(()).expand(delta.shape[1], self.inputs, *self.kernel)
        zero = [0] * len(self.kernel)
        _, gradient, bias = torch.ops.aten.convolution_backward(
            delta, x, weight, [delta.shape[1]], self.stride, zero, self.dilation, False, zero, self.groups,
            [False, True, self.has_bias],
        )  # fmt: skip
        return self.pack({"weight": gradient, "bias": bias})

    def tangent(self, x: Tensor, v: Packed) -> Tensor:
        local = self.unpack(dense(v))
        moved: Tensor = self.convolve(
            self._padded(x), local["weight"], local.get("bias"), self.stride, 0, self.dilation, self.groups
        )
        return moved


def table_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the packed shape of a parameter on its own: ``[first, rest]``, or ``[1, P]`` below two dimensions."""
    return (1, parameter.numel()) if parameter.ndim < 2 else (parameter.shape[0], parameter[0].numel())


_REGISTRY: dict[type[nn.Module], type[LayerSpec]] = {
    nn.Linear: LinearSpec,
    nn.Conv1d: ConvSpec,
    nn.Conv2d: ConvSpec,
    nn.Conv3d: ConvSpec,
}


def register_layer(module_type: type[nn.Module], spec: type[LayerSpec]) -> None:
    """Say how modules of a type pack their parameters and which Q family they get, from the next ``fishlegify`` on.

    Args:
        module_type: A module class; subclasses count too while they inherit its ``forward``.
        spec: A subclass of :class:`LayerSpec`, constructed as ``spec(module, names)`` for every layer.

    Raises:
        TypeError: If either is not a class of its kind.

    Example:
        >>> from torch import nn
        >>> class Scale(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x)
        >>> register_layer(Scale, LinearSpec)
        >>> type(find_spec(Scale(2, 3), ("weight", "bias"))).__name__
        'LinearSpec'
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type={module_type!r} must be a subclass of torch.nn.Module")
    if not (isinstance(spec, type) and issubclass(spec, LayerSpec)):
        raise TypeError(f"spec={spec!r} must be a subclass of fishleg_func.LayerSpec")
    _REGISTRY[module_type] = spec


def find_spec(module: nn.Module, names: tuple[str, ...]) -> LayerSpec | None:
    """Return the spec of a module with trainable parameters ``names``, or ``None`` where each is a block of its own."""
    for base in type(module).__mro__:
        spec = _REGISTRY.get(base)
        if spec is not None:
            same_forward = getattr(type(module), "forward", None) is getattr(base, "forward", None)
            return spec(module, names) if same_forward and spec.covers(names) else None
    return None
