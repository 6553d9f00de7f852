"""Which layer types have hooks, and how each packs its parameters."""

from __future__ import annotations

from torch import nn

from .convolutions import ConvSpec, ConvTransposeSpec
from .layers import LayerSpec, LinearSpec

__all__ = ["register_layer"]

_REGISTRY: dict[type[nn.Module], type[LayerSpec] | None] = {
    nn.Linear: LinearSpec,
    nn.modules.linear.NonDynamicallyQuantizableLinear: None,  # attention reads its weight, and never calls it
    nn.Conv1d: ConvSpec,
    nn.Conv2d: ConvSpec,
    nn.Conv3d: ConvSpec,
    nn.ConvTranspose1d: ConvTransposeSpec,
    nn.ConvTranspose2d: ConvTransposeSpec,
    nn.ConvTranspose3d: ConvTransposeSpec,
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
    """Return the spec of a module with trainable parameters ``names``, or ``None`` where it has no hook."""
    for base in type(module).__mro__:
        if base in _REGISTRY:
            spec = _REGISTRY[base]
            same_forward = getattr(type(module), "forward", None) is getattr(base, "forward", None)
            return spec(module, names) if spec and same_forward and spec.covers(names) else None
    return None
