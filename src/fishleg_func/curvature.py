"""The learned inverse Fisher of one model: its Q modules, what they are made of, and the update that moves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _checks, auxiliary
from ._noise import Noise
from ._trees import assign_
from ._types import Groups, Options, Packed
from .batch import Batch
from .capture import Save
from .qmodules import Carry, QModule, Roots
from .schedule import RATE, weight_of

_LEAST_LEVEL = 1e-3  # of the largest that there was: bounds Q where the outputs have lost their variance
_ROUNDING = 64.0  # units in the last place by which an operator that was moved along may differ from a new one


class Prepared(NamedTuple):
    """What an update of the curvature needs, once all code of the model has run.

    Attributes:
        statistics: Random gradients that are to be gathered yet; none where the bases were refreshed.
        level: Mean diagonal entry of the Fisher of the outputs, to be gathered with them.
        gather: In compiled code, whether to gather them.
        rate: Their least weight in the running means.
        probe: What λ moves along, if it moves.
        refreshed: Whether the bases were refreshed.
        ok: In compiled code, whether to change anything.
    """

    statistics: Mapping[str, Packed]
    level: Tensor
    gather: Tensor | None
    rate: float
    probe: auxiliary.Probe | None
    refreshed: bool
    ok: Tensor | None


class Learned(NamedTuple):
    """What a move of λ did.

    Attributes:
        value: A(λ) before it, 0-d.
        carries: By block, how Q m has moved, where that is known.
        ok: In compiled code, whether anything was changed.
    """

    value: Tensor
    carries: Mapping[str, Carry | None]
    ok: Tensor | None


class Curvature:
    """Q of every block, applied through operators that are kept until λ or a basis changes.

    Args:
        q: Q modules, by block name.
        rule: Moves λ.
        groups: Hyperparameters.
        options: What is fixed.

    Attributes:
        skipped: 0-d tensor: auxiliary updates left out, and compiled steps skipped, for non-finite numbers.
        losses: A(λ) before the last update and its terms by block, ``[1 + blocks]``; NaN before the first.
    """

    def __init__(self, q: Mapping[str, QModule], rule: auxiliary.Rule, groups: Groups, options: Options) -> None:
        self.q: dict[str, QModule] = dict(q)
        self.rule, self.groups, self._options = rule, groups, options
        scalar = groups.hypers[0].lr
        self.operators: dict[str, Roots] = {k: tuple(t.detach() for t in q.operator()) for k, q in self.q.items()}
        self.skipped = torch.zeros((), dtype=torch.int64, device=scalar.device)
        self.losses = scalar.new_full((1 + len(self.q),), torch.nan)
        self._level = scalar.new_zeros(2)  # of the Fisher of the outputs: running mean, largest
        self._count = torch.zeros((), dtype=torch.int64, device=scalar.device)  # of the batches in it
        self._modules = {k: list(q.modules()) for k, q in self.q.items()}
        self._versions = self._tensor_versions()

    def dampings(self) -> list[Tensor]:
        """Return γ of each group, 0-d, by what is known of the Fisher of the outputs; it counts as one before that."""
        mean, largest = self._level.unbind()
        level = torch.where(largest > 0, torch.maximum(mean, _LEAST_LEVEL * largest), 1)
        return [hyper.damping + hyper.relative_damping * level for hyper in self.groups.hypers]

    def damping(self) -> dict[str, Tensor]:
        """Return γ of each block, 0-d."""
        values = self.dampings()
        return {name: values[self.groups.of_block[name]] for name in self.q}

    def apply(self, name: str, u: Packed) -> Packed:
        """Return Q u for one block."""
        return self.q[name].act(self.operators[name], u)

    def unapply(self, name: str, v: Tensor) -> Tensor:
        """Return Q⁻¹ v for one block."""
        return self.q[name].unact(self.operators[name], v)

    def prepare(
        self,
        batch: Batch,
        u: Mapping[str, Packed] | None,
        noise: Noise,
        *,
        refresh: bool,
        ok: Tensor | None,
        save: Save,
        rate: float = RATE,
    ) -> Prepared:
        """Run the model's and the likelihood's code; where the bases are due, gather statistics and refresh them.

        Args:
            batch: Where the Fisher is taken.
            u: Direction of the probe, ``None`` where λ does not move.
            noise: Source of the draws.
            refresh: Whether the bases are due; if they are not, nothing is changed yet.
            ok: In compiled code, whether to change anything.
            save: Is told what is about to be written.
            rate: Least weight of the statistics in their running means.

        Returns:
            What :meth:`move` needs.

        Raises:
            FloatingPointError: If a statistic is not finite, before anything is changed (eager only).
        """
        statistics, level, checksum, any_terms = batch.random_gradient(self.q, noise.fork(1))
        ok = both(ok, require_finite(None, checksum, lambda: "a statistic of the Fisher"))
        gather = ok if self._options.aux_batch_size is None else both(ok, any_terms)  # a part may be all masked
        if refresh:
            save([self._level, self._count])
            self._gather_level(level, gather, rate)
            damping = self.damping()
            for name in list(statistics):
                save(self.q[name].buffers())
                self.q[name].gather_(statistics.pop(name), gather, rate)
                self.q[name].refresh_(damping[name], ok)
        probe = None if u is None else self._probe(u, batch, noise, refresh)
        return Prepared(statistics, level, gather, rate, probe, refresh, ok)

    def _probe(self, u: Mapping[str, Packed], batch: Batch, noise: Noise, refreshed: bool) -> auxiliary.Probe:
        options = self._options
        fisher = batch.fisher(options.fisher, noise.fork(2))
        return auxiliary.probe(
            self.q, self.operators, u, fisher, self.damping(), unit=options.aux_rule,
            preconditioned=options.precondition_aux, outdated=refreshed,
            scale_free=options.step_norm == "layer" and options.u != "gaussian" and not options.precondition_aux,
        )  # fmt: skip

    def move(self, prepared: Prepared) -> Learned:
        """Move λ by the rule, with the operators of refreshed bases; where A is not finite, λ stays."""
        probe, ok = prepared.probe, prepared.ok
        if prepared.refreshed:
            self.renew(ok=ok)
        if probe is None:
            return Learned(torch.zeros_like(prepared.level), {}, ok)
        assign_(self.losses, torch.cat((probe.loss[None], probe.parts)), ok)
        finite, changed = probe.loss.isfinite(), ok
        if torch.compiler.is_compiling():
            self.skipped.add_((~finite if ok is None else ok & ~finite).long())
            changed = both(ok, finite)
        elif not finite:
            self.skipped.add_(1)
            warnings.warn("A(λ) is not finite: this auxiliary update was left out; raise damping", stacklevel=2)
            return Learned(probe.loss, self._carries(prepared, _stay), ok)
        carries = self.rule(probe, self.q, changed)
        self.adopt()
        return Learned(probe.loss, {} if prepared.refreshed else carries, ok)

    def _carries(self, prepared: Prepared, carry: Carry) -> auxiliary.Carries:
        return {} if prepared.refreshed else dict.fromkeys(self.q, carry)

    def gather(self, prepared: Prepared) -> None:
        """Add the statistics that wait for the next refresh."""
        if not prepared.refreshed:
            self._gather_level(prepared.level, prepared.gather, prepared.rate)
            for name, statistic in prepared.statistics.items():
                self.q[name].gather_(statistic, prepared.gather, prepared.rate)
            self.adopt()

    def _gather_level(self, level: Tensor, ok: Tensor | None, rate: float) -> None:
        assign_(self._count, self._count + 1, ok)
        mean, largest = self._level.unbind()
        level = level.to(mean.dtype)
        mean = mean.lerp(level, weight_of(self._count.to(mean.dtype), rate))
        assign_(self._level, torch.stack((mean, torch.maximum(largest, level))), ok)

    def movable(self) -> list[Tensor]:
        """Return what :meth:`move` writes."""
        lam = [p for q in self.q.values() for p in q.parameters()]
        moments = list(self.rule.tensors().values()) if isinstance(self.rule, auxiliary.Adam) else []
        return [*lam, *(t for name in self.q for t in self.own(name)), *moments, self.skipped]

    def renew(self, names: Iterable[str] | None = None, ok: Tensor | None = None) -> None:
        """Compute operators anew, of all blocks or some: updates of λ move them along, up to rounding."""
        for name in self.q if names is None else names:
            self.q[name].renew_(self.operators[name], ok)
        self.adopt()

    def adopt(self) -> None:
        """Take λ and the bases as they are for what the operators were made of."""
        if not torch.compiler.is_compiling():
            self._versions = self._tensor_versions()

    def changed(self) -> list[str]:
        """Return the blocks where something was written into ``q`` from outside; eager only."""
        now = self._tensor_versions()
        touched = [name for name in now if now[name] != self._versions[name]]  # compiled steps do not take note
        return [name for name in touched if self._outdated(name)]

    def _outdated(self, name: str) -> bool:
        """Tell whether an operator is not that of λ and the basis, beyond rounding."""
        for t, new in zip(self.operators[name], self.q[name].operator(), strict=True):
            unit = new.abs().max()  # squares of large entries overflow
            if not torch.dist(t / unit, new / unit) <= _ROUNDING * torch.finfo(t.dtype).eps * (new / unit).norm():
                return True
        return False

    def own(self, name: str) -> list[Tensor]:
        """Return the tensors of an operator that are not the basis itself."""
        return [t for t in self.operators[name] if all(t is not b for b in self.q[name].buffers())]

    def _tensor_versions(self) -> dict[str, list[int]]:
        def versions(module: nn.Module) -> list[int]:
            return [t._version for of in (module._parameters, module._buffers) for t in of.values() if t is not None]

        return {k: [v for module in modules for v in versions(module)] for k, modules in self._modules.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name: λ, bases, statistics, operators, the rule's moments; the tensors themselves."""
        named = {f"q.{name}.{key}": t for name, q in self.q.items() for key, t in q.state_dict().items()}
        named |= {f"operator.{name}.{i}": t for name in self.q for i, t in enumerate(self.own(name))}
        named |= {"fisher.level": self._level, "fisher.count": self._count}
        if isinstance(self.rule, auxiliary.Adam):
            named |= {f"adam.{key}": t for key, t in self.rule.tensors().items()}
        return named


def _stay(p: Tensor) -> Tensor:
    """Q has not changed: nor has Q m."""
    return p


def require_finite(loss: Tensor | None, checksum: Tensor, what: Callable[[], str]) -> Tensor | None:
    """Raise in eager code where a number is not finite; in compiled code return whether all are, as a tensor.

    Args:
        loss: The loss, where it is known.
        checksum: Finite only if all else is.
        what: Returns what that is, for the error.

    Returns:
        A 0-d bool, or ``None`` in eager code.

    Raises:
        FloatingPointError: If a number is not finite (eager only).
    """
    if not torch.compiler.is_compiling():
        _checks.finite_step(loss, checksum, what)
        return None
    return checksum.isfinite() if loss is None else loss.isfinite() & checksum.isfinite()


def both(ok: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Return whether both hold, as 0-d tensors; ``None`` in eager code, where what does not hold has raised."""
    return more if ok is None else ok if more is None else ok & more
