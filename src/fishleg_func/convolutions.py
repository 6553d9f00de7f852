"""Convolutions, plain and transposed: every output position is a row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._trees import dense
from ._types import Packed, Params
from .layers import LayerSpec, Matrix


class ConvSpec(Matrix, LayerSpec):
    """``nn.Conv1d``, ``Conv2d``, ``Conv3d``: U = [W | b], ``[out, in * kernel + 1]``, a leading axis for groups."""

    def __init__(self, module: nn.modules.conv._ConvNd, names: tuple[str, ...]) -> None:
        self.kernel: tuple[int, ...] = tuple(module.kernel_size)
        self.stride, self.dilation, self.groups = tuple(module.stride), tuple(module.dilation), module.groups
        Matrix.__init__(self, self._exchanged(module.weight), ("weight", "bias")[: len(names)], self.groups)
        self.pad_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        self.pad = self._padding(module)
        self.inputs = module.in_channels // module.groups
        self.convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]

    def _exchanged(self, weight: Tensor) -> Tensor:
        """Return the weight with its outputs first."""
        return weight

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
        return Matrix.pack(self, {"weight": gradient, "bias": bias})

    def tangent(self, x: Tensor, v: Packed) -> Tensor:
        local = Matrix.unpack(self, dense(v))
        moved: Tensor = self.convolve(
            self._padded(x), local["weight"], local.get("bias"), self.stride, 0, self.dilation, self.groups
        )
        return moved


class ConvTransposeSpec(ConvSpec):
    """``nn.ConvTranspose1d``, ``ConvTranspose2d``, ``ConvTranspose3d``: a plain convolution of a stuffed input.

    Between the entries of the input go ``stride - 1`` zeros, around them as many as the output asks for; its kernel is
    the layer's, mirrored, with inputs and outputs exchanged. U is that kernel, packed as for a plain convolution.
    """

    def __init__(self, module: nn.modules.conv._ConvTransposeNd, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        self.gaps, self.stride = self.stride, (1,) * len(self.kernel)
        padding: Any = module.padding
        self.edges = [d * (k - 1) - p for k, d, p in zip(self.kernel, self.dilation, padding, strict=True)]

    def _padding(self, module: nn.modules.conv._ConvNd) -> tuple[int, ...]:
        return (0,) * (2 * len(module.kernel_size))

    def _exchanged(self, weight: Tensor) -> Tensor:
        """Return the kernel of the plain convolution; undone by doing it again."""
        weight = weight.view(self.groups, -1, *weight.shape[1:]).transpose(1, 2)  # "(g i) o ... -> (g o) i ..."
        return weight.flatten(0, 1).flip(tuple(range(2, weight.ndim - 1)))

    def pack(self, tensors: Params) -> Tensor:
        return super().pack(tensors | {"weight": self._exchanged(tensors["weight"])})

    def times(self, tensors: Params, r: Tensor) -> Tensor:
        return super().times(tensors | {"weight": self._exchanged(tensors["weight"])}, r)

    def unpack(self, u: Tensor) -> Params:
        tensors = super().unpack(u)
        return tensors | {"weight": self._exchanged(tensors["weight"])}

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        x = super().keep(args, kwargs, out)
        first = x.ndim - len(self.kernel)
        pad: list[int] = []
        for i, (k, d, gap, edge) in enumerate(zip(self.kernel, self.dilation, self.gaps, self.edges, strict=True)):
            axis = first + i
            x = F.pad(x.unsqueeze(axis + 1), (0, 0) * (len(self.kernel) - 1 - i) + (0, gap - 1)).flatten(axis, axis + 1)
            pad = [edge, out.shape[axis] + d * (k - 1) - edge - x.shape[axis], *pad]
        return F.pad(x, pad)
