"""The Q families by name."""

from __future__ import annotations

from collections.abc import Callable

from .bases import KFAC, Diagonal, Eigen, Embedding
from .kronecker import Kronecker, ScaledKronecker
from .qmodules import Dense, QModule

__all__ = ["FAMILIES", "KFAC", "Dense", "Diagonal", "Eigen", "Embedding", "Kronecker", "ScaledKronecker"]

FAMILIES: dict[str, Callable[..., QModule]] = {
    "kfac": KFAC,
    "kronecker": Kronecker,
    "scaled_kronecker": ScaledKronecker,
    "eigen": Eigen,
    "diagonal": Diagonal,
    "dense": Dense,
    "embedding": Embedding,
}
"""Each is called as ``family(shape, dtype=..., device=...)``."""
