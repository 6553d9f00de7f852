"""Loaders whose batches only Q learns from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ._types import Inputs


class Feed:
    """Takes batches from a loader one by one, and begins again at its end.

    Args:
        loader: An iterable of batches that can be iterated again.

    Attributes:
        position: Batches used up since the loader was last begun.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._held: list[Any] = []  # a batch that was taken and not used up
        self.position = 0

    def resume(self, position: int) -> None:
        """Begin the loader again, and skip the batches that an earlier run has taken."""
        self._batches, self._held, self.position = None, [], position

    def next(self) -> tuple[Inputs, Tensor | None]:
        """Return the next batch, the same until it is :meth:`used`.

        Returns:
            Inputs, and targets or ``None`` where a batch is a dict without labels, or inputs alone.

        Raises:
            ValueError: If the loader has no batches.
        """
        if not self._held:
            self._held = [self._take()]
        return _split(self._held[0])

    def used(self) -> None:
        """Go on to the next batch."""
        self.position += len(self._held)
        self._held = []

    def _take(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._loader)
            for _ in range(self.position):  # where an earlier run had got to
                next(self._batches, None)
        for batch in self._batches:
            return batch
        self._batches, self.position = iter(self._loader), 0
        for batch in self._batches:
            return batch
        raise ValueError(
            f"loader={self._loader!r} must yield batches, every time that it is iterated; a generator yields once: "
            "pass a list or a DataLoader"
        )


def _split(batch: Any) -> tuple[Inputs, Tensor | None]:
    """Return the inputs and the targets of a batch."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        return dict(batch), labels if isinstance(labels, Tensor) else None
    if isinstance(batch, (list, tuple)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise ValueError(
            f"a batch of a loader has {len(batch)} parts and must be (inputs, targets), (inputs,), a tensor or a dict"
        )
    return batch, None
