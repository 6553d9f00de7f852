"""Checkpoints that a crash cannot take away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint with ``torch.save``; the file that was there is replaced only by a whole one.

    It is written beside, flushed to the disk, and then renamed: whenever the process is killed, ``path`` is either the
    checkpoint before or this one. Read it with ``torch.load(path, weights_only=True)``.

    Args:
        state: What to save, such as ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``.
        path: The file.

    Raises:
        OSError: If it cannot be written; the file that was there is.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint({"x": torch.ones(2)}, f"{folder}/last.pt")
        ...     torch.load(f"{folder}/last.pt", weights_only=True)
        {'x': tensor([1., 1.])}
    """
    path = Path(path).resolve()  # what a link points to
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
