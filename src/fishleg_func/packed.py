"""What is packed without hooks: parameters whose gradient autograd takes, and which of them share a matrix.

A weight and its bias make one matrix where a module is known to use them as one map (attention, recurrent layers,
``nn.Bilinear``, subclasses with a forward of their own), and one of two columns for each channel in a norm. Any other
parameter is a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ._types import Params
from .layers import Layout, Matrix

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

_GROUPS: dict[type[nn.Module], Callable[[Any], int]] = {
    nn.Linear: lambda module: 1,
    nn.modules.conv._ConvNd: lambda module: module.groups,
    nn.Bilinear: lambda module: 1,
    nn.MultiheadAttention: lambda module: 3 if module._qkv_same_embed_dim else 1,
    nn.RNNBase: lambda module: 1,
    nn.RNNCellBase: lambda module: 1,
}
"""Modules whose weights map to their first axis, with a bias of the same name: in how many parts each weight is cut."""


class Channels(Matrix):
    """A norm's weight and bias, one row [w | b] for each channel: shape ``[channels, 1, 2]``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.flatten(), ("weight", "bias"), weight.numel())
        self._each = weight.shape

    def unpack(self, u: Tensor) -> Params:
        return {name: t.view(self._each) for name, t in super().unpack(u).items()}


def find_layouts(module: nn.Module, own: Mapping[str, nn.Parameter]) -> list[Layout]:
    """Return how some trained parameters of a module are packed together, without a hook.

    Args:
        module: Any module.
        own: Its trained parameters, by their names in the module.
    """
    if isinstance(module, _NORMS):
        return [Channels(own["weight"])] if own.keys() == {"weight", "bias"} else []
    groups = next((of(module) for kind, of in _GROUPS.items() if isinstance(module, kind)), None)
    if groups is None or getattr(module, "transposed", False):
        return []
    found: list[Layout] = []
    for name, weight in own.items():
        bias = name.replace("weight", "bias")
        if weight.ndim > 1 and bias != name:
            found.append(Matrix(weight, (name, bias) if bias in own else (name,), groups))
    return found


def is_table(module: nn.Module) -> bool:
    """Tell whether a module's weight is a table of rows, of which a batch uses some."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def table_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the packed shape of a parameter on its own: ``[first, rest]``, or ``[1, P]`` below two dimensions."""
    return (1, parameter.numel()) if parameter.ndim < 2 else (parameter.shape[0], parameter[0].numel())
