"""Models of low precision, computed in float32: their parameters stay as they are, and no operation rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a dtype of lower precision, and others as they are."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a model with parameters of low precision computes in float32; eager only.

    Parameters that shall be differentiated in float32 have to be replaced by float32 ones.

    Args:
        model: What will be run.
    """
    low = any(p.dtype != wide(p.dtype) for p in model.parameters())
    return _Widening() if low else contextlib.nullcontext()


class _Widening(TorchFunctionMode):
    """Makes every operation of low precision one of float32: its tensors, its ``dtype=`` and its result."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = pytree.tree_map(_wide, (args, dict(kwargs or {})))
        return pytree.tree_map(_wide, func(*args, **kwargs))


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(wide(x.dtype))
    return wide(x) if isinstance(x, torch.dtype) else x
