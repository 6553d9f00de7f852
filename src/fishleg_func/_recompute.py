"""Activation checkpointing, switched off while this library runs a model.

``torch.func`` can differentiate neither the hooks on saved tensors nor the autograd function that
``torch.utils.checkpoint`` is made of (torch 2.13). They are looked up in that module at each call, so what they do can
be left out there, however a model has imported ``checkpoint``. Activations are then kept, as without checkpointing.
The same goes for ``requires_grad_()`` in a forward pass, which transformers adds to reentrant checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as module
from torch import Tensor


class _Plain:
    """Stands for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Call the function, and keep what it needs for the backward pass."""
        return function(*args)


_REPLACED = {"_checkpoint_hook": lambda frame: contextlib.nullcontext(), "CheckpointFunction": _Plain}


def _as_it_is(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor


@contextlib.contextmanager
def without_recomputation() -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` call what it is given, and nothing else; eager only."""
    before = {name: getattr(module, name) for name in _REPLACED if hasattr(module, name)}
    own = torch.Tensor.requires_grad_
    try:
        for name in before:
            setattr(module, name, _REPLACED[name])
        torch.Tensor.requires_grad_ = _as_it_is  # type: ignore[assignment, method-assign]
        yield
    finally:
        torch.Tensor.requires_grad_ = own  # type: ignore[method-assign]
        for name, value in before.items():
            setattr(module, name, value)
