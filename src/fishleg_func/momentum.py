r"""The momentum m, kept as p = Q m so that Q meets factored gradients only, and the direction of a step.

While Q stands, p is all that a step needs. When Q changes, p is made anew from m: kept beside p where Q changes
often, had back as :math:`m = Q^{-1}p` where it rarely does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ._trees import assign_, average_, checksum, dense, inner, total
from ._types import Packed
from .curvature import Curvature, Learned, both, require_finite

RULES = ("nesterov", "before", "after")

_WHAT = "the direction Q m"


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
        self._curvature, self._beta, self._nesterov = curvature, curvature.groups.beta, rule == "nesterov"
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
        return m if held is None else torch.where(self.p[name].isfinite().all(), m, held)

    def forget(self) -> None:
        """Know of m what p says, since p has moved on; of a p that was not finite compiled code cannot tell."""
        if self._held:
            self._unsound = self._unsound if torch.compiler.is_compiling() else set()
            self._held = {k: m for k, m in self._held.items() if k in self._unsound}

    def average(
        self, loss: Tensor, g: Mapping[str, Packed], ok: Tensor | None
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """Take up a gradient while Q stands: p is averaged beside m, from Q g with g factored.

        Args:
            loss: The loss, for the error.
            g: Gradient by block; blocks that have none stay as they are.
            ok: In compiled code, whether to change anything.

        Returns:
            The direction of these blocks, and ``ok`` with what that adds to it.

        Raises:
            FloatingPointError: If the direction is not finite; nothing is changed (eager only).
        """
        qg = self.applied(g)
        sums = checksum(qg | {f"{k}, as it was": self.p[k] for k in self._unsound})
        ok = both(ok, require_finite(loss, sums, _WHAT))
        if self._nesterov:
            qg = {k: dense(x) for k, x in qg.items()}  # once, for p and for the direction
            ahead = {k: dense(qg[k]).lerp(self.p[k], self._beta(k).square()) for k in g}  # before anything is written
        for k in g:
            weight = 1 - self._beta(k)
            if k in self.m:
                average_(self.m[k], g[k], weight, ok)
            average_(self.p[k], qg[k], weight, ok)
        self.forget()
        return (ahead if self._nesterov else {k: self.p[k] for k in g}), ok

    def predicted(self, g: Mapping[str, Packed], direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Return :math:`p^\top Q^{-1} p` of a direction p by block, 0-d; g is the gradient that it was made of."""
        along = {k: inner(self.m[k], p) for k, p in direction.items()}
        if not self._nesterov:
            return along
        return {k: x.lerp(inner(g[k], direction[k]), 1 - self._beta(k)) for k, x in along.items()}

    def follow(
        self, loss: Tensor, g: Mapping[str, Packed], m: Mapping[str, Tensor], learned: Learned
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """Take up a gradient after Q has changed: p is carried along where it can be, or computed anew.

        What is carried along goes on as where Q stands: it is averaged with Q g, Q being the new one.

        Args:
            loss: The loss, for the error.
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
        new_m: dict[str, Tensor] = {}
        new_p: dict[str, Tensor] = {}
        for k in self.p:
            if k not in carries:
                new_m[k] = m[k].lerp(dense(g[k]), 1 - self._beta(k)) if k in g else m[k]
                new_p[k] = dense(self._curvature.apply(k, new_m[k]))
            else:
                moved = carries[k](self.p[k])
                new_p[k] = moved.lerp(qg[k], 1 - self._beta(k)) if k in g else moved
        ok = both(learned.ok, require_finite(loss, total(checksum(x) for x in (new_p, qg) if x), _WHAT))
        ahead = {k: qg[k].lerp(new_p[k], self._beta(k)) for k in g} if self._nesterov else {k: self.p[k] for k in g}
        for k, kept in self.m.items():
            if k in new_m:
                assign_(kept, new_m[k], ok)
            elif k in g:
                average_(kept, g[k], 1 - self._beta(k), ok)
        for k, p in self.p.items():
            assign_(p, new_p[k], ok)
        self.forget()
        return ahead, ok

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
            (self._unsound.discard if self.p[k].sum().isfinite() else self._unsound.add)(k)
