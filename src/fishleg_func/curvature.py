"""The learned inverse Fisher of one model: its Q modules, what they are made of, and the update that moves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import _checks, auxiliary
from ._noise import Noise
from ._types import Hyper, Options, Packed
from .batch import Batch, PackedMap
from .qmodules import QModule, Roots


class Curvature:
    """Q of every block, applied through roots that are kept until λ or a basis changes.

    Args:
        q: Q modules, by block name.
        rule: Moves λ.
        hyper: Hyperparameters.
        options: What is fixed.

    Attributes:
        skipped: 0-d tensor: auxiliary updates left out, and compiled steps skipped, for non-finite numbers.
    """

    def __init__(self, q: Mapping[str, QModule], rule: auxiliary.Rule, hyper: Hyper, options: Options) -> None:
        self.q: dict[str, QModule] = dict(q)
        self.rule, self._hyper, self._options = rule, hyper, options
        self.roots: dict[str, Roots] = {k: tuple(r.detach().clone() for r in q.roots()) for k, q in self.q.items()}
        self.skipped = torch.zeros((), dtype=torch.int64, device=hyper.lr.device)
        self._versions = self._tensor_versions()

    def apply(self, name: str, u: Packed) -> Packed:
        """Return Q u for one block."""
        q, roots = self.q[name], self.roots[name]
        return q.color(roots, q.whiten(roots, u))

    def update(
        self,
        batch: Batch,
        make_probe: Callable[[], Mapping[str, Packed]],
        noise: Noise,
        *,
        refresh: bool,
        ok: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gather statistics, refresh the bases where due, update λ.

        Args:
            batch: Where the Fisher is taken.
            make_probe: Returns the direction u.
            noise: Source of the draws.
            refresh: Whether the bases are due.
            ok: In compiled code, whether to change anything.

        Returns:
            A(λ) before the update, and ``ok`` with what the statistics add to it.

        Raises:
            FloatingPointError: If a statistic is not finite, before anything is changed (eager only).
        """
        if any(q.has_basis for q in self.q.values()):
            z, checksum, any_terms = batch.random_gradient(self.q, noise.fork(1))
            ok = both(ok, require_finite(torch.zeros_like(checksum), checksum, "a statistic of the Fisher"))
            gather = ok if self._options.aux_batch_size is None else both(ok, any_terms)  # a part may be all masked
            for name, statistic in z.items():
                self.q[name].gather_(statistic, gather)
                if refresh:
                    self.q[name].refresh_(self._hyper.damping, ok)
            if refresh:
                self.refresh_roots()
        if not self._options.update_aux_every:
            return torch.zeros_like(self._hyper.lr), ok
        return self.update_lambda(make_probe(), batch.fisher(self._options.fisher, noise.fork(2)), ok), ok

    def update_lambda(self, u: Mapping[str, Packed], fisher: PackedMap, ok: Tensor | None) -> Tensor:
        """Move λ by the rule and return A(λ); where that is not finite, λ stays."""
        unit, preconditioned = self._options.aux_rule, self._options.precondition_aux
        probe = auxiliary.probe(
            self.q, self.roots, u, fisher, self._hyper.damping, unit=unit, preconditioned=preconditioned
        )
        finite = probe.loss.isfinite()
        if torch.compiler.is_compiling():
            self.skipped.add_((~finite if ok is None else ok & ~finite).long())
            ok = both(ok, finite)
        elif not finite:
            self.skipped.add_(1)
            warnings.warn("A(λ) is not finite: this auxiliary update was left out; raise damping", stacklevel=2)
            return probe.loss
        self.rule(probe, self.q, ok)
        self.refresh_roots()
        return probe.loss

    def refresh_roots(self) -> None:
        """Bring what Q is made of up to date with λ and the bases."""
        for name, q in self.q.items():
            for kept, new in zip(self.roots[name], q.roots(), strict=True):
                kept.copy_(new)
        if not torch.compiler.is_compiling():
            self._versions = self._tensor_versions()

    def sync(self) -> bool:
        """Take up what was written into ``q`` from outside; eager only.

        Returns:
            Whether Q has changed by it.
        """
        if self._tensor_versions() == self._versions:
            return False
        before = [root.clone() for roots in self.roots.values() for root in roots]
        self.refresh_roots()
        return not all(map(torch.equal, before, (root for roots in self.roots.values() for root in roots)))

    def _tensor_versions(self) -> list[int]:
        return [t._version for q in self.q.values() for t in (*q.parameters(), *q.buffers())]

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name: λ, bases, statistics and the rule's moments, the tensors themselves."""
        named = {f"q.{name}.{key}": t for name, q in self.q.items() for key, t in q.state_dict().items()}
        if isinstance(self.rule, auxiliary.Adam):
            named |= {f"adam.{key}": t for key, t in self.rule.tensors().items()}
        return named

    def undoable(self) -> list[Tensor]:
        """Return what an update writes, for an exception to undo; nothing in compiled code, which raises none."""
        if torch.compiler.is_compiling():
            return []
        return [*self.tensors().values(), *(root for roots in self.roots.values() for root in roots)]


def require_finite(loss: Tensor, checksum: Tensor, what: str) -> Tensor | None:
    """Raise in eager code where a number is not finite; in compiled code return whether all are, as a tensor."""
    if not torch.compiler.is_compiling():
        _checks.finite_step(loss, checksum, what)
        return None
    return loss.isfinite() & checksum.isfinite()


def both(ok: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Return whether both hold, as 0-d tensors; ``None`` in eager code, where what does not hold has raised."""
    return more if ok is None else ok if more is None else ok & more
