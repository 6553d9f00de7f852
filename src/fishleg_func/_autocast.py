"""Autocast inside of a model's own code, switched off while this library runs the model.

Accelerate wraps ``model.forward`` in one, and users write it there. Curvature is computed in the parameters' precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Let every ``torch.autocast`` that is entered switch autocast off; eager only."""
    enter: Any = torch.autocast.__enter__

    def enter_disabled(self: Any) -> Any:
        enabled, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = enabled

    torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
