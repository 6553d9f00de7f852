"""Which weights go: the parameters that may, the groups that go together, and how many go at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import _checks
from ._types import Params
from .transform import ancestry

Structure = int | str


def cubic_schedule(start: float, end: float, steps: int) -> list[float]:
    r"""Return rising sparsities, in large steps at first: :math:`s_k = s_n + (s_0 - s_n)(1 - k/n)^3`.

    Args:
        start: :math:`s_0`, not in the list.
        end: :math:`s_n`, its last entry.
        steps: n.

    Returns:
        :math:`s_1, \dots, s_n`.

    Raises:
        ValueError: If steps < 1, or not 0 <= start <= end < 1.

    Example:
        >>> import fishleg_func as ff
        >>> ff.pruning.cubic_schedule(0.0, 0.75, 2)
        [0.65625, 0.75]

    References:
        Zhu & Gupta (2017), "To prune, or not to prune", equation 1.
    """
    _checks.integer("steps", steps, 1, "use about 10")
    _checks.number("end", end, 0, 1, "use a fraction such as 0.9")
    if not 0 <= start <= end:
        raise ValueError(f"start={start!r} must be in [0, {end!r}], where it ends; use 0.0")
    return [end + (start - end) * (1 - k / steps) ** 3 for k in range(1, steps + 1)]


def chosen(
    shapes: Mapping[str, torch.Size], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> list[str]:
    """Return the names of the parameters to prune: of two and more dimensions, and matching."""
    known = {a for name in shapes for a in ancestry(name)}
    wanted, unwanted = ([p] if isinstance(p, str) else list(p or ()) for p in (include, exclude))
    _checks.all_patterns_match("include", wanted, known)
    _checks.all_patterns_match("exclude", unwanted, known)

    def is_chosen(name: str) -> bool:
        own = ancestry(name)
        listed = include is None or any(_checks.matches(w, own) for w in wanted)
        return len(shapes[name]) > 1 and listed and not any(_checks.matches(w, own) for w in unwanted)

    names = [name for name in shapes if is_chosen(name)]
    if not names:
        raise ValueError(
            f"include={include!r}, exclude={exclude!r} must leave a parameter of two or more dimensions to prune, of "
            f"{list(shapes)}"
        )
    return names


def group_size(name: str, shape: torch.Size, structure: Structure) -> int:
    """Return how many entries of a parameter next to each other are removed together."""
    row = shape[1:].numel()
    if structure == "weight":
        return 1
    if structure == "channel":
        return row
    if not isinstance(structure, int) or isinstance(structure, bool) or structure < 1:
        raise ValueError(f"structure={structure!r} must be 'weight', 'channel' or a number of inputs such as 4")
    if row % structure:
        raise ValueError(
            f"structure={structure} must divide the {row} inputs of {name!r}; use another, or exclude={name!r}"
        )
    return structure


def choose_(kept: Params, scores: Params, sizes: Mapping[str, int], fraction: float) -> None:
    """Remove groups of the least saliency per weight, up to a fraction of the weights; what is removed stays so.

    Args:
        kept: Bool, by name; changed.
        scores: Saliency of each weight.
        sizes: Entries of a group, by name: the parameters that are compared with each other.
        fraction: Of their weights.
    """
    means = [scores[name].reshape(-1, size).mean(1) for name, size in sizes.items()]
    stays = torch.cat([kept[name].reshape(-1, size).any(1) for name, size in sizes.items()])
    counts = torch.cat([torch.full_like(mean, size) for mean, size in zip(means, sizes.values(), strict=True)]).long()
    order = torch.where(stays, torch.cat(means), -1).argsort(stable=True)
    goes = torch.zeros_like(stays)
    goes[order] = counts[order].cumsum(0) <= round(fraction * int(counts.sum()))
    start = 0
    for (name, size), mean in zip(sizes.items(), means, strict=True):
        part = goes[start : start + len(mean)].repeat_interleave(size)
        kept[name] &= ~part.view(kept[name].shape)
        start += len(mean)
