"""A gradient that backward passes have left in the parameters, as the source of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ._types import Packed
from .batch import Batch
from .qmodules import QModule


class LeftGradient:
    """A gradient without its loss, and the batch behind it, run once if it is asked for.

    Args:
        g: Gradient by block.
        batch: Runs the batch.
        whole: Whether that is the whole batch; of a part the gradient is another.
    """

    def __init__(self, g: Mapping[str, Packed], batch: Callable[[], Batch], *, whole: bool) -> None:
        self._g, self._run, self._whole = g, batch, whole
        self._batch: Batch | None = None

    def gradient(self) -> tuple[Tensor | None, Mapping[str, Packed]]:
        """Return no loss, and the gradient."""
        return None, self._g

    def batch(self) -> Batch:
        """Return where the Fisher is taken."""
        if self._batch is None:
            self._batch = self._run()
        return self._batch

    def probe(self, q: Mapping[str, QModule]) -> Mapping[str, Packed]:
        """Return the gradient of that batch, of fewer rows where that is cheaper; else the one that was left."""
        batch = self.batch()
        if batch.has_gradient and self._whole:
            return batch.probe(q)
        return {k: self._g[k] if k in self._g else next(q[k].parameters()).new_zeros(q[k].shape) for k in q}
