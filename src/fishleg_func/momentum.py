r"""The momentum m, kept as p = Q m so that Q meets factored gradients only, and the direction of a step.

While Q stands, p is all that a step needs. When Q changes, p is made anew from m: kept beside p where Q changes
often, had back as :math:`m = Q^{-1}p` where it rarely does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ._trees import assign_, average_, checksum, dense, inner, norm_bound, total
from ._types import LowRank, Packed
from .curvature import Curvature, Learned, both, require_finite

RULES = ("nesterov", "before", "after")

A_GRADIENT, _A_DIRECTION = "a gradient", "the norm of the direction Q m"  # in errors


class Direction(NamedTuple):
    """Where a step goes, for the blocks that move.

    Attributes:
        p: By block.
        norms: Of each, in the same order: ``[moving]``.
    """

    p: Mapping[str, Tensor]
    norms: Tensor

    @classmethod
    def of(cls, p: Mapping[str, Tensor]) -> Self:
        """Return the direction."""
        return cls(p, torch.stack([torch.linalg.vector_norm(x) for x in p.values()]))


class Momentum:
    """m and p by block, packed dense.

    Args:
        curvature: Q, and the decay of each block's average.
        rule: Whether gradients are averaged ``"before"`` Q is applied, or ``"after"``: then p averages Q g, and there
            is no m. Both step along p. ``"nesterov"`` averages before, and steps along β p + (1 − β) Q g.
        paired: Whether every block keeps m; if not, those whose family cannot invert Q do.

    Attributes:
        p: By block.
        m: Of the blocks that keep it.
    """

    def __init__(self, curvature: Curvature, rule: str, *, paired: bool) -> None:
        self._curvature, self._groups, self._nesterov = curvature, curvature.groups, rule == "nesterov"
        self.before = before = rule != "after"
        self.p = {k: ts[0].new_zeros(curvature.q[k].shape) for k, ts in curvature.operators.items()}
        pairs = [k for k in self.p if before and (paired or not curvature.q[k].inverts)]
        self.m = {k: self.p[k].clone() for k in pairs}
        self._held: dict[str, Tensor] = {}  # m of blocks whose p was made anew since they took up a gradient
        self._unsound: set[str] = set()  # those of them whose p was not finite then

    def momentum(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return m by block, of all blocks or some: what is kept, or Q⁻¹ p; nothing where gradients meet Q first.

        Where Q is singular to rounding m is zero.

        Args:
            names: The blocks.
        """
        return {k: self._momentum(k) for k in (self.p if names is None else names)} if self.before else {}

    def _momentum(self, name: str) -> Tensor:
        if name in self.m:
            return self.m[name]
        held = self._held.get(name)
        if held is not None and name not in self._unsound:
            return held
        m = self._curvature.unapply(name, self.p[name])
        return m if held is None else torch.where(norm_bound(self.p[name]).isfinite(), m, held)

    def forget(self) -> None:
        """Know of m what p says, since p has moved on; of a p that was not finite compiled code cannot tell."""
        if self._held:
            self._unsound = self._unsound if torch.compiler.is_compiling() else set()
            self._held = {k: m for k, m in self._held.items() if k in self._unsound}

    def average(
        self, loss: Tensor | None, g: Mapping[str, Packed], ok: Tensor | None
    ) -> tuple[Direction, Tensor | None]:
        """Take up a gradient while Q stands: p is averaged beside m, from Q g with g factored.

        Args:
            loss: The loss, where it is known.
            g: Gradient by block; blocks that have none stay as they are.
            ok: In compiled code, whether to change anything.

        Returns:
            The direction of these blocks, and ``ok`` with what that adds to it.

        Raises:
            FloatingPointError: If the loss, the gradient or the norm of the direction is not finite; nothing is changed
                (eager only).
        """
        qg: Mapping[str, Packed] = self.applied(g)
        rest = self._groups.from_beta(_rest, g)
        if self._nesterov:
            old, share = self._groups.from_beta(torch.square, g), self._groups.from_beta(_share, g)
            ahead = Direction.of({k: _mixed(x, self.p[k], old[k]) for k, x in qg.items()})
            qg = ahead.p  # p moves towards it, and Q g is used up
            sums = [ahead.norms.sum()]  # one pass over what is made of Q g and p
        else:
            share = rest
            sums = [norm_bound(x) for x in (*qg.values(), *(self.p[k] for k in self._unsound))]
        sums += [checksum({k: g[k]}) for k in g if k in self.m]  # whose product may overflow where Q g does not

        def what() -> str:
            return _A_DIRECTION if checksum(g).isfinite() else A_GRADIENT

        ok = both(ok, require_finite(loss, total(sums), what))
        for k in g:
            if k in self.m:
                average_(self.m[k], g[k], rest[k], ok)
            average_(self.p[k], qg[k], share[k], ok)
        self.forget()
        return (ahead if self._nesterov else Direction.of({k: self.p[k] for k in g})), ok

    def predicted(self, g: Mapping[str, Packed], direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Return :math:`p^\top Q^{-1} p` of a direction p by block, 0-d; g is the gradient that it was made of."""
        along = {k: inner(self.m[k], p) for k, p in direction.items()}
        if not self._nesterov:
            return along
        rest = self._groups.from_beta(_rest, along)
        return {k: x.lerp(inner(g[k], direction[k]), rest[k]) for k, x in along.items()}

    def follow(
        self, loss: Tensor | None, g: Mapping[str, Packed], m: Mapping[str, Tensor], learned: Learned
    ) -> tuple[Direction, Tensor | None]:
        """Take up a gradient after Q has changed: p is carried along where it can be, or computed anew.

        What is carried along goes on as where Q stands: it is averaged with Q g, Q being the new one.

        Args:
            loss: The loss, where it is known.
            g: Gradient by block; of blocks that have none m stays, and p follows Q.
            m: From :meth:`momentum`, before Q has changed.
            learned: What has changed Q.

        Returns:
            The direction of the blocks that have one, and ``ok`` with what that adds to it.

        Raises:
            FloatingPointError: If the direction is not finite; m and p are not changed (eager only).
        """
        if not self.before:
            return self.average(loss, g, learned.ok)
        carries = {k: carry for k, carry in learned.carries.items() if carry is not None}
        qg = {k: dense(self._curvature.apply(k, x)) for k, x in g.items() if self._nesterov or k in carries}
        rest = self._groups.from_beta(_rest, g)
        new_m: dict[str, Tensor] = {}
        new_p: dict[str, Tensor] = {}
        for k in self.p:
            if k not in carries:
                new_m[k] = m[k].lerp(dense(g[k]), rest[k]) if k in g else m[k]
                new_p[k] = dense(self._curvature.apply(k, new_m[k]))
            else:
                moved = carries[k](self.p[k])
                new_p[k] = moved.lerp(qg[k], rest[k]) if k in g else moved
        direction = Direction.of({k: new_p[k].lerp(qg[k], rest[k]) if self._nesterov else new_p[k] for k in g})
        sums = [direction.norms.sum(), *(norm_bound(p) for p in new_p.values())]
        ok = both(learned.ok, require_finite(loss, total(sums), lambda: _A_DIRECTION))
        for k, kept in self.m.items():
            if k in new_m:
                assign_(kept, new_m[k], ok)
            elif k in g:
                average_(kept, g[k], rest[k], ok)
        for k, p in self.p.items():
            assign_(p, new_p[k], ok)
        self.forget()
        return direction, ok

    def applied(self, g: Mapping[str, Packed]) -> dict[str, Packed]:
        """Return Q g by block."""
        return {k: self._curvature.apply(k, x) for k, x in g.items()}

    def renew(self, m: Mapping[str, Tensor]) -> None:
        """Compute p = Q m anew, for blocks whose Q was changed outside of a step; eager only.

        Where it is not finite, the next step says so, unless Q has changed again by then.

        Args:
            m: From :meth:`momentum`, before Q has changed.
        """
        for k, momentum in m.items():
            self.p[k].copy_(dense(self._curvature.apply(k, momentum)))
            self._held[k] = momentum
            (self._unsound.discard if norm_bound(self.p[k]).isfinite() else self._unsound.add)(k)


def _rest(beta: Tensor) -> Tensor:
    """Return the weight of what is new in an average."""
    return 1 - beta


def _share(beta: Tensor) -> Tensor:
    r"""Return the weight, beside p, of :math:`\beta^2 p + (1 - \beta^2) Qg` in :math:`\beta p + (1 - \beta) Qg`."""
    return 1 / (1 + beta)


def _mixed(qg: Packed, p: Tensor, weight: Tensor) -> Tensor:
    """Return Q g moved towards p by a weight; where it is a product, in the memory that it is multiplied out into."""
    return qg.dense().lerp_(p, weight) if isinstance(qg, LowRank) else qg.lerp(p, weight)
