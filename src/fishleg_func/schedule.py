"""When a step takes statistics of the Fisher, what they weigh, and when it refreshes the bases."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

CADENCE = 10  # steps between statistics of large batches, where ``update_aux_every`` does not say
ALONE = 50  # first steps that all move λ where there is a family without a basis
RATE = 0.05  # least weight of the newest statistics in their running mean
_SPACINGS = ((16, 1), (40, 3), (80, 5))  # (a, b): batches of a rows are b more steps apart
_REFRESHES = ((1, 2), (10, 4), (40, 8), (80, 16), (320, 32))  # (a, b): from update a on, one in b refreshes


class Due(NamedTuple):
    """What a step does beside moving the parameters.

    Attributes:
        statistics: Whether it takes statistics of the Fisher.
        refresh: Whether it refreshes the bases, which it does only with statistics.
        learn: Whether it moves λ, which it does only with statistics.
    """

    statistics: bool
    refresh: bool
    learn: bool


def is_due(t: int, every: int, first: int) -> bool:
    """Tell whether step t updates the curvature: each of the first steps, then one in ``every``.

    Args:
        t: Steps so far.
        every: The cadence.
        first: How many are the first: the cadence of large batches, or :data:`ALONE` if that is more and λ has no
            basis to start from.

    Returns:
        Whether it does: one arithmetic expression, so that a compiled step has two variants whatever t is.
    """
    return (t // first) * (t % every) == 0


def is_refresh(t: int, every: int) -> bool:
    """Tell whether a curvature step refreshes the bases: steps 0, 1, 2, 4 and 8 of the first ``every``; then fewer.

    One in ``2 * every`` steps from ``every`` on, in ``4 * every`` from ``10 * every``, in ``8 * every`` from
    ``40 * every``, in ``16 * every`` from ``80 * every`` and in ``32 * every`` from ``320 * every`` on. Statistics
    change ever more slowly, and a refresh is the one thing here that costs cubes of the sides.

    Args:
        t: Steps so far.
        every: Steps between statistics of large batches.

    Returns:
        Whether it does: one arithmetic expression, as in :func:`is_due`.
    """
    first = every // (t + 1)  # zero from step ``every`` on
    misses = [(t // (start * every)) * (t % (period * every)) for start, period in _REFRESHES]
    return sum(misses) + first * (t * (t - 1) * (t - 2) * (t - 4) * (t - 8)) == 0


def spacing(rows: int) -> int:
    """Return the usual number of steps between statistics: a divisor of :data:`CADENCE`, fewer for small batches.

    A few rows tell little of F, and cost little.

    Args:
        rows: Terms of the loss in a batch.

    Returns:
        One below 16 rows, 2 below 40, 5 below 80, and 10 from there on: without a branch, so that a compiled step has
        no variant for each.
    """
    return 1 + sum(more * min(1, rows // least) for least, more in _SPACINGS)


def rate_of(every: int) -> float:
    """Return the least weight of statistics taken every so many steps: the mean spans 200 steps, and 20 batches."""
    return RATE * min(CADENCE, every) / CADENCE


def weight_of(count: Tensor, rate: float) -> Tensor:
    """Return the weight of the last of ``count`` batches in a running mean: a plain mean at first, exponential later.

    Args:
        count: 0-d, floating point.
        rate: The least weight.

    Returns:
        A 0-d tensor.
    """
    return count.reciprocal().clamp(min=rate)
