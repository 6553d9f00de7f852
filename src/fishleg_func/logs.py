"""Where numbers go: a CSV file, TensorBoard, a line on the screen.

Each takes the flat dict of :meth:`fishleg_func.FishLegStep.statistics`, or any other dict of numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CSV", "TensorBoard", "line"]

_LINE = {
    "fishleg/auxiliary_loss": "A",
    "fishleg/damping": "γ",
    "fishleg/step_norm": "|Δθ|",
    "fishleg/accuracy": "accuracy",
    "fishleg/skipped": "skipped",
}


class CSV:
    """A CSV file of one row for each step; each row is on disk when :meth:`write` returns.

    Args:
        path: The file. One that is there already is continued.

    Example:
        >>> import pathlib, tempfile
        >>> import fishleg_func as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = ff.logs.CSV(f"{folder}/log.csv")
        ...     log.write(10, {"loss": 0.5})
        ...     log.write(20, {"loss": 0.25})
        ...     pathlib.Path(f"{folder}/log.csv").read_text().split()
        ['step,loss', '10,0.5', '20,0.25']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append a row.

        Args:
            step: Number of the step.
            numbers: By name; the names of the first row are those of all.

        Raises:
            ValueError: If the names are not those of the file; nothing is written.
        """
        row = {"step": step, **numbers}
        header = self._header()
        if header and set(header) != row.keys():
            raise ValueError(
                f"the names {sorted(set(header) ^ row.keys())} are in the row or in {self.path}, and must be in both; "
                "log the same numbers at each step (accuracy too), or into another file"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header or list(row), lineterminator="\n")
            if not header:
                writer.writeheader()
            writer.writerow(row)

    def _header(self) -> list[str]:
        """Return the names in the file; none where there is no file, or it is empty."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])


class TensorBoard:
    """A folder of TensorBoard events.

    Args:
        folder: Where the events go.

    Raises:
        ImportError: If the package tensorboard is not installed.

    Example:
        >>> import os, tempfile
        >>> import fishleg_func as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = ff.logs.TensorBoard(folder)
        ...     log.write(10, {"loss": 0.5})
        ...     log.close()
        ...     len(os.listdir(folder))
        1
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "the package tensorboard must be installed for logs.TensorBoard: pip install tensorboard"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a point to the curve of every number.

        Args:
            step: Number of the step.
            numbers: By name.
        """
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self._writer.close()


def line(numbers: Mapping[str, float]) -> str:
    """Return the overall numbers in one line, for a progress bar.

    With tqdm, ``bar.set_postfix_str(line(...))``; with rich, ``progress.update(task, description=line(...))``.

    Args:
        numbers: By name; what is not FishLeg's, such as a loss, comes first, without what is by layer.

    Returns:
        The line.

    Example:
        >>> import fishleg_func as ff
        >>> ff.logs.line({"loss": 0.51234, "fishleg/damping": 1e-3, "fishleg/damping/0": 1e-3, "fishleg/skipped": 0.0})
        'loss 0.512  γ 0.001  skipped 0'
    """
    own = {name: value for name, value in numbers.items() if not name.startswith("fishleg/")}
    known = {label: numbers[name] for name, label in _LINE.items() if name in numbers}
    return "  ".join(f"{label} {value:.3g}" for label, value in {**own, **known}.items())
