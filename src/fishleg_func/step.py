"""The stepping function: gradient, curvature, momentum, step norm, parameters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import _checks, auxiliary, diagnostics
from ._noise import Noise
from ._trees import assign_, dense, inner, inverse_or_zero, total
from ._types import Accuracy, Hyper, Inputs, Options, Packed, Params
from .batch import Batch, PackedMap, Runner
from .capture import kept_random_state, restored_on_error, tensors_restored_on_error
from .likelihoods import Likelihood
from .qmodules import QModule, Roots
from .schedule import is_due, is_refresh

_DEFAULT_CADENCE = 10  # steps between statistics where update_aux_every=0 learns nothing


class FishLegStep:
    """One training step as a callable, ``loss = step(inputs, targets)``; made by :func:`fishleg_func.fishlegify`.

    Eager or inside ``torch.compile(step, fullgraph=True)``. An eager step that meets a non-finite loss or gradient
    raises ``FloatingPointError`` before anything is changed; a compiled one cannot raise: it changes nothing, adds one
    to ``skipped`` and returns the non-finite loss.

    Args:
        runner: Runs batches through the model.
        hyper: Hyperparameters.
        options: What is fixed.
        rule: Moves λ.
        seed: Of the step's own random numbers.

    Attributes:
        model: The model that is trained.
        q: Q module of each block, by name.
        hyper: Hyperparameters, a :class:`Hyper` of 0-d tensors.
        skipped: 0-d tensor: compiled steps skipped, and auxiliary updates left out, for non-finite numbers.
    """

    def __init__(self, runner: Runner, hyper: Hyper, options: Options, rule: auxiliary.Rule, seed: int) -> None:
        self.model, self.hyper = runner.model, hyper
        self.q: dict[str, QModule] = dict(runner.plan.q)
        self._runner, self._options, self._rule = runner, options, rule
        self._roots: dict[str, Roots] = {k: tuple(r.detach().clone() for r in q.roots()) for k, q in self.q.items()}
        self._before = options.momentum == "before"
        # p = Q m, by block, packed; and m, which momentum="after" does not keep
        self._direction = {k: self._roots[k][0].new_zeros(q.shape) for k, q in self.q.items()}
        self._momentum = {k: p.clone() for k, p in self._direction.items()} if self._before else {}
        self._noise = Noise(seed, runner.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=runner.device)
        self._last: tuple[Inputs, Tensor] | None = None  # the last step's batch
        self._t = 0  # steps so far
        self._updates = 0  # calls of update_aux so far
        self._removed = False

    @property
    def likelihood(self) -> Likelihood | None:
        """The likelihood; ``None`` until it is resolved from the first targets."""
        return self._runner.likelihood

    @torch.no_grad()
    def __call__(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """Take one training step in place.

        Args:
            inputs: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
            targets: Observations.

        Returns:
            The loss before the step, a 0-d tensor.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite (eager only); nothing is changed.
            RuntimeError: If the step was removed.
            ValueError: If inputs are on another device, or targets do not fit the likelihood.
            TypeError: If the model's output or the targets have a wrong type.
        """
        self._require_hooks()
        cadence = self._options.update_aux_every or _DEFAULT_CADENCE
        curvature = is_due(self._t, cadence)
        refresh = curvature and is_refresh(self._t, cadence)
        if torch.compiler.is_compiling():
            loss = self._step(inputs, targets, curvature, refresh)
        else:
            with restored_on_error(self.model):
                loss = self._step(inputs, targets, curvature, refresh)
        self._t += 1
        self._last = (inputs, targets)
        return loss

    def _step(self, inputs: Inputs, targets: Tensor, curvature: bool, refresh: bool) -> Tensor:
        """The algorithm, from a batch to new parameters."""
        batch = self._runner.run(inputs, targets, twice=curvature)
        loss, g, checksum = batch.gradient()
        ok = self._require_finite(loss, checksum)
        with tensors_restored_on_error(self._q_state() if curvature else []):
            if curvature:
                _, ok = self._update_curvature(self._auxiliary_batch(batch, inputs, targets), g, refresh, ok)
            m, p = self._averages(g, curvature)
            ok = _both(ok, self._require_finite(loss, total(x.sum() for x in p.values())))
        for kept, new in ((self._momentum, m), (self._direction, p)):
            for name, value in new.items():
                assign_(kept[name], value, ok)
        self._move(self._step_scales(), ok)
        for name, buffer in self.model.named_buffers():
            assign_(buffer, batch.buffers[name], ok)
        if ok is not None:
            self.skipped.add_((~ok).long())
        self._noise.advance_()
        return loss

    def _averages(self, g: Mapping[str, Packed], q_changed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the new m and p = Q m; while Q stands, p is averaged beside m, from Q g with g factored."""
        m, p, beta = self._momentum, self._direction, self.hyper.beta
        m = {k: torch.lerp(dense(g[k]), m[k], beta) for k in m}
        if m and q_changed:
            return m, {k: dense(self._apply_q(k, m[k])) for k in m}
        return m, {k: torch.lerp(dense(self._apply_q(k, g[k])), p[k], beta) for k in p}

    def _apply_q(self, name: str, u: Packed) -> Packed:
        q, roots = self.q[name], self._roots[name]
        return q.color(roots, q.whiten(roots, u))

    def _step_scales(self) -> dict[str, Tensor]:
        """Return s(p) / p of each block, a 0-d tensor."""
        p = self._direction
        if self._options.step_norm == "layer":
            blocks = self._runner.plan.blocks
            return {b.name: b.target_norm() * inverse_or_zero(torch.linalg.vector_norm(p[b.name])) for b in blocks}
        factor = torch.ones_like(self.hyper.lr)
        if self._options.step_norm == "kl":
            predicted = self.hyper.lr.square() * total(inner(self._momentum[k], p[k]) for k in p)
            bound = (self.hyper.kl_clip * inverse_or_zero(predicted)).sqrt()
            factor = torch.where(predicted > self.hyper.kl_clip, bound, factor)
        return dict.fromkeys(p, factor)

    def _move(self, scales: Mapping[str, Tensor], ok: Tensor | None) -> None:
        """Write the parameters: θ ← θ − η s(p) − η wd θ."""
        params = self._runner.params()
        keep = 1 - self.hyper.lr * self.hyper.weight_decay
        for block in self._runner.plan.blocks:
            scale = self.hyper.lr * scales[block.name]
            for name, direction in block.unpack(self._direction[block.name], params).items():
                assign_(params[name], params[name] * keep - scale * direction, ok)

    def _require_finite(self, loss: Tensor, checksum: Tensor) -> Tensor | None:
        """Raise in eager code where a number is not finite; in compiled code return whether all are, as a tensor."""
        if not torch.compiler.is_compiling():
            _checks.finite_step(loss, checksum)
            return None
        return loss.isfinite() & checksum.isfinite()

    def _require_hooks(self) -> None:
        if self._removed:
            raise RuntimeError("this step was removed from its model, and must not be used; call fishlegify again")

    def _auxiliary_batch(self, batch: Batch, inputs: Inputs, targets: Tensor | None) -> Batch:
        """Return the batch that curvature is taken from: the step's own, or its first ``aux_batch_size`` examples."""
        size = self._options.aux_batch_size
        if size is None:
            return batch
        cut = pytree.tree_map(lambda x: x[:size] if isinstance(x, Tensor) and x.ndim else x, (inputs, targets))
        return self._runner.run(*cut, twice=True)

    def _update_curvature(
        self, batch: Batch, g: Mapping[str, Packed], refresh: bool, ok: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gather statistics, refresh bases where due, update λ; return A(λ), and ``ok`` after the statistics."""
        if any(q.has_basis for q in self.q.values()):
            z, checksum = batch.random_gradient(self.q, self._noise.fork(1))
            ok = _both(ok, self._require_finite(torch.zeros_like(checksum), checksum))
            for name, statistic in z.items():
                self.q[name].gather_(statistic, ok)
                if refresh:
                    self.q[name].refresh_(self.hyper.damping, ok)
            if refresh:
                self._refresh_roots()
        if not self._options.update_aux_every:
            return torch.zeros_like(self.hyper.lr), ok
        fisher = batch.fisher(self._options.fisher, self._noise.fork(2))
        return self._update_lambda(self._probe_direction(g), fisher, ok), ok

    def _q_state(self) -> list[Tensor]:
        """Return what a curvature update writes, for an exception to undo; nothing in compiled code, which has none."""
        if torch.compiler.is_compiling():
            return []
        named = [t for name, t in self._tensors().items() if name.startswith(("q.", "adam."))]
        return [*named, *(root for roots in self._roots.values() for root in roots)]

    def _probe_direction(self, g: Mapping[str, Packed]) -> Mapping[str, Packed]:
        if self._options.u == "momentum":
            return {k: torch.lerp(dense(g[k]), m, self.hyper.beta) for k, m in self._momentum.items()}
        if self._options.u == "gaussian":
            noise = self._noise.fork(3)
            return {k: noise.normal(p, i) for i, (k, p) in enumerate(self._direction.items())}
        return g

    def _update_lambda(self, u: Mapping[str, Packed], fisher: PackedMap, ok: Tensor | None) -> Tensor:
        """Move λ by the rule; where A is not finite, λ stays."""
        unit, preconditioned = self._options.aux_rule, self._options.precondition_aux
        probe = auxiliary.probe(
            self.q, self._roots, u, fisher, self.hyper.damping, unit=unit, preconditioned=preconditioned
        )
        finite = probe.loss.isfinite()
        if torch.compiler.is_compiling():
            self.skipped.add_((~finite if ok is None else ok & ~finite).long())
            ok = _both(ok, finite)
        elif not finite:
            self.skipped.add_(1)
            warnings.warn("A(λ) is not finite: this auxiliary update was left out; raise damping", stacklevel=2)
            return probe.loss
        self._rule(probe, self.q, ok)
        self._refresh_roots()
        return probe.loss

    def _refresh_roots(self) -> None:
        """Bring what Q is made of up to date with λ and the bases."""
        for name, q in self.q.items():
            for kept, new in zip(self._roots[name], q.roots(), strict=True):
                kept.copy_(new)

    @torch.no_grad()
    def update_aux(self, inputs: Inputs, targets: Tensor | None = None) -> Tensor:
        r"""Make one auxiliary update: statistics, bases on a schedule of their own, and λ; the parameters stay.

        Args:
            inputs: What the model is called with.
            targets: Observations, at which ``u="gradient"`` takes the gradient and ``fisher="empirical"`` the scores;
                without them the gradient is taken on the last step's batch.

        Returns:
            :math:`A(\lambda)` before the update, a 0-d tensor; its minimum is
            :math:`-\frac12 u^\top (F + \gamma I)^{-1} u`.

        Raises:
            ValueError: If targets are needed and there are none.
            FloatingPointError: If the loss or a gradient is not finite; nothing is changed.
        """
        self._require_hooks()
        if targets is None and self._options.fisher == "empirical":
            raise ValueError("targets=None must be given with fisher='empirical'; pass the observed targets")
        if targets is None and self._options.u != "gaussian" and self._last is None:
            raise ValueError(f"targets=None must be given with u={self._options.u!r} before the first step")
        with kept_random_state(self.model):
            batch = self._runner.run(inputs, targets, twice=True)
            g: Mapping[str, Packed] = {}
            if self._options.u != "gaussian":
                source = batch if targets is not None else self._runner.run(*self._last, twice=False)  # type: ignore[misc]
                loss, g, checksum = source.gradient()
                self._require_finite(loss, checksum)
            with tensors_restored_on_error(self._q_state()):
                value, _ = self._update_curvature(batch, g, is_refresh(self._updates, 1), None)
        for name, m in self._momentum.items():
            self._direction[name].copy_(dense(self._apply_q(name, m)))
        self._updates += 1
        self._noise.advance_()
        return value

    @torch.no_grad()
    def natural_gradient(self, inputs: Inputs, targets: Tensor) -> Params:
        """Return Q times the gradient, by parameter name; nothing is changed.

        Args:
            inputs: What the model is called with.
            targets: Observations.

        Returns:
            A dict with an entry shaped like each trained parameter.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite.
        """
        self._require_hooks()
        with kept_random_state(self.model):
            batch = self._runner.run(inputs, targets, twice=False)
        loss, g, checksum = batch.gradient()
        self._require_finite(loss, checksum)
        params = self._runner.params()
        natural: Params = {}
        for block in self._runner.plan.blocks:
            natural |= block.unpack(dense(self._apply_q(block.name, g[block.name])), params)
        return natural

    @torch.no_grad()
    def accuracy(self, inputs: Inputs, n: int = 8) -> Accuracy:
        r"""Measure how well Q inverts: :math:`\|(F + \gamma I)Qu - u\| / \|u\|` on fresh standard-normal u.

        Args:
            inputs: The batch that defines the exact Fisher F.
            n: Number of probes.

        Returns:
            The mean over probes, overall and per block; 0 is exact.

        Raises:
            ValueError: If n < 1, or the likelihood is not resolved yet.
        """
        self._require_hooks()
        _checks.number("n", n, 1, float("inf"), "use a few probes, such as 8")
        with kept_random_state(self.model):
            fisher = self._runner.run(inputs, None, twice=True).fisher("exact", self._noise.fork(2))

        def residual(u: Mapping[str, Tensor]) -> dict[str, Tensor]:
            v = {k: self._apply_q(k, u[k]) for k in u}
            fv = fisher(v)
            return {k: dense(fv[k]) + self.hyper.damping * dense(v[k]) - u[k] for k in u}

        noise, salts = self._noise.fork(3), iter(range(n * len(self.q)))
        probes = [{k: noise.normal(p, next(salts)) for k, p in self._direction.items()} for _ in range(n)]
        self._noise.advance_()
        return diagnostics.accuracy(residual, probes)

    def report(self) -> diagnostics.Report:
        """Return what is done with every parameter: Q family, shapes, bytes of state, share of FLOPs; printable.

        Returns:
            A :class:`~fishleg_func.diagnostics.Report` with one row for each parameter of the model.
        """
        plan = self._runner.plan
        direct = self._runner.unhooked | {b.name for b in plan.blocks if b.spec is None}
        momentum = {k: [self._momentum[k]] if self._before else [] for k in self.q}
        state = {
            k: [*q.parameters(), *q.buffers(), *self._roots[k], self._direction[k], *momentum[k]]
            for k, q in self.q.items()
        }
        return diagnostics.report(self.model, plan, direct, state, self.likelihood)

    def _tensors(self) -> dict[str, Tensor]:
        """Return all state that is kept between steps, by name: the tensors themselves."""
        tensors = {f"hyper.{k}": t for k, t in vars(self.hyper).items()}
        for name, q in self.q.items():
            tensors |= {f"q.{name}.{k}": t for k, t in q.state_dict().items()}
            tensors[f"direction.{name}"] = self._direction[name]
        tensors |= {f"momentum.{name}": m for name, m in self._momentum.items()}
        if isinstance(self._rule, auxiliary.Adam):
            tensors |= {f"adam.{k}": t for k, t in self._rule.tensors().items()}
        return {**tensors, "noise": self._noise.counter, "skipped": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the step keeps: λ, bases, momentum, hyperparameters, counters, random numbers.

        The model's own state is in the model's ``state_dict``. With both restored (and the global random stream, where
        the model draws from it) training goes on bit for bit.

        Returns:
            Copies of tensors by name, and two integers; ``torch.load(..., weights_only=True)`` reads it.
        """
        counts = {"t": self._t, "updates": self._updates}
        return {**{k: t.detach().clone() for k, t in self._tensors().items()}, **counts}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, onto this step's device.

        Args:
            state: From a step made with the same model and arguments.

        Raises:
            ValueError: If names or shapes differ; nothing is changed.
        """
        own = self._tensors()
        _checks.same_state({**own, "t": self._t, "updates": self._updates}, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._t, self._updates = int(state["t"]), int(state["updates"])
        self._refresh_roots()

    def remove(self) -> None:
        """Take the hooks off the model, which is then as it was before ``fishlegify``."""
        self._runner.capture.remove()
        self._removed = True

    def __enter__(self) -> Self:
        """Return the step; leaving the block removes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the step."""
        self.remove()


def _both(ok: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Return whether both hold, as 0-d tensors; ``None`` in eager code, where what does not hold has raised."""
    return more if ok is None else ok if more is None else ok & more
