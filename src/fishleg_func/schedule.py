"""When a step updates the curvature, and when it refreshes the bases."""

from __future__ import annotations


def is_due(t: int, every: int) -> bool:
    """Tell whether step t updates the curvature: each of the first ``every`` steps, then one in ``every``.

    Args:
        t: Steps so far.
        every: The cadence.

    Returns:
        One arithmetic expression, so that a compiled step has two variants whatever t is.
    """
    return (t // every) * (t % every) == 0


def is_refresh(t: int, every: int) -> bool:
    """Tell whether a curvature step refreshes the bases: at first each, then every second, and later every fourth.

    Args:
        t: Steps so far.
        every: The cadence.

    Returns:
        One arithmetic expression, as in :func:`is_due`.
    """
    return (t // every) * (t % (2 * every) + (t // (10 * every)) * (t % (4 * every))) == 0
