"""The stepping function: one batch in, one training step in place."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import _checks, auxiliary, diagnostics
from ._trees import assign_, checksum, dense
from ._types import Accuracy, Hyper, Inputs, Options, Packed, Params
from .batch import Batch, Runner
from .capture import kept_random_state, restored_on_error, tensors_restored_on_error
from .curvature import require_finite
from .engine import Engine
from .inverse import InverseFisher, covered
from .momentum import A_GRADIENT
from .schedule import Due, is_refresh


class FishLegStep(Engine):
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
        q: Q module of each block, by name. What is written into its parameters and buffers is taken up by the next
            eager call.
        hyper: Hyperparameters, a :class:`Hyper` of 0-d tensors.
        skipped: 0-d tensor: compiled steps skipped, and auxiliary updates left out, for non-finite numbers.
    """

    def __init__(self, runner: Runner, hyper: Hyper, options: Options, rule: auxiliary.Rule, seed: int) -> None:
        super().__init__(runner, hyper, options, rule, seed)
        self._last: tuple[Inputs, Tensor] | None = None  # the last step's batch

    @torch.no_grad()
    def __call__(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """Take one training step in place.

        Args:
            inputs: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
            targets: Observations.

        Returns:
            The loss before the step, a 0-d tensor.

        Raises:
            FloatingPointError: If the loss, a gradient or the norm of the direction is not finite (eager only); nothing
                is changed.
            RuntimeError: If the step was removed.
            ValueError: If inputs are on another device, or targets do not fit the likelihood.
            TypeError: If the model's output or the targets have a wrong type.
        """
        self._require_hooks()
        _checks.targets_given(targets)
        due = self._due()
        if torch.compiler.is_compiling():
            loss = self._step(inputs, targets, due)
        else:
            self._sync()
            with restored_on_error(self.model):
                loss = self._step(inputs, targets, due)
        self._t += 1
        self._last = _detached((inputs, targets))
        return loss

    def _step(self, inputs: Inputs, targets: Tensor, due: Due) -> Tensor:
        """The step, from a batch to new parameters and buffers."""
        whole = self._options.aux_batch_size is None
        batch = self._runner.run(inputs, targets, twice=due.learn and whole and self._linear)
        buffers = dict(self.model.named_buffers())
        _checks.same_buffers(buffers, batch.buffers)

        def batch_for_q() -> Batch:
            if whole:
                return batch
            batch.let_go()
            return self.run(inputs, targets)

        with tensors_restored_on_error() as save:
            if self._decay_waits:
                save([hyper.weight_decay for hyper in self.hypers])
                self._fill_in_decay(batch.likelihood)
            ok = self._advance(batch, batch_for_q, due)
        if self._decay_waits:
            self._decay_waits = False
        self._runner.settle(batch)
        batch.learn_likelihood_(self.hyper.lr, ok)
        for name, buffer in buffers.items():
            assign_(buffer, batch.buffers[name], ok)
        loss, _ = batch.gradient()
        assert loss is not None  # there are targets
        return loss

    @torch.no_grad()
    def update_aux(self, inputs: Inputs, targets: Tensor | None = None) -> Tensor:
        r"""Make one auxiliary update: statistics, bases on a schedule of their own, and λ; the parameters stay.

        With ``step_norm="layer"`` λ of ``"kfac"`` learns no scale where ``u="gradient"``; for a Q that is to be the
        inverse Fisher, and not only to give a direction, take Gaussian probes (the default) or ``step_norm=None``.

        Args:
            inputs: What the model is called with.
            targets: Observations, at which ``u="gradient"`` takes the gradient and ``fisher="empirical"`` the scores;
                without them that gradient is taken on the last step's batch.

        Returns:
            :math:`A(\lambda)` before the update, a 0-d tensor; its minimum is
            :math:`-\frac12 u^\top (F + \gamma I)^{-1} u`. Zero with ``update_aux_every=0``, which never moves λ.

        Raises:
            ValueError: If targets are needed and there are none.
            FloatingPointError: If the loss or a gradient is not finite; nothing is changed.
        """
        self._require_hooks()
        if targets is not None:
            _checks.targets_given(targets)
        if targets is None and self._options.fisher == "empirical":
            raise ValueError("targets=None must be given with fisher='empirical'; pass the observed targets")
        if targets is None and self._options.u != "gaussian" and self._last is None:
            raise ValueError(f"targets=None must be given with u={self._options.u!r} before the first step")
        self._sync()
        with kept_random_state(self.model):
            batch = self._runner.run(inputs, targets, twice=self._learns and self._linear)
            g: Mapping[str, Packed] = {}
            source = batch
            if self._options.u != "gaussian":
                source = batch if targets is not None else self._runner.run(*self._last, twice=False)  # type: ignore[misc]
                loss, g = source.gradient()
                require_finite(loss, checksum(g), lambda: A_GRADIENT)
            elif targets is not None:
                loss = batch.loss()
                require_finite(loss, loss, lambda: A_GRADIENT)
            refresh = is_refresh(self._updates, 1)
            with tensors_restored_on_error() as save:
                u = self._probe(source, g) if self._learns else None
                prepared = self._curvature.prepare(batch, u, self._noise, refresh=refresh, ok=None, save=save)
                batch.let_go()
                save([*self._curvature.movable(), *self._direction.values()])
                m = self._averages.momentum() if any(p.any() for p in self._direction.values()) else {}
                value = self._curvature.move(prepared).value
                self._curvature.gather(prepared)
                self._averages.renew(m)
        self._runner.settle(source)
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
        _checks.targets_given(targets)
        self._sync()
        with kept_random_state(self.model):
            batch = self._runner.run(inputs, targets, twice=False)
        loss, g = batch.gradient()
        require_finite(loss, checksum(g), lambda: A_GRADIENT)
        self._runner.settle(batch)
        params = self._runner.params()
        natural: Params = {}
        for block in self._runner.plan.blocks:
            natural |= block.unpack(dense(self._curvature.apply(block.name, g[block.name])), params)
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
        _checks.integer("n", n, 1, "use a few probes, such as 8")
        self._sync()
        with kept_random_state(self.model):
            fisher = self._runner.run(inputs, None, twice=True).fisher("exact", self._meter.fork(2))
        damping = self._curvature.damping()

        def residual(u: Mapping[str, Tensor]) -> dict[str, Tensor]:
            v = {k: self._curvature.apply(k, u[k]) for k in u}
            fv = fisher(v)
            return {k: dense(fv[k]) + damping[k] * dense(v[k]) - u[k] for k in u}

        noise, salts = self._meter.fork(3), iter(range(n * len(self.q)))
        probes = [{k: noise.normal(p, next(salts)) for k, p in self._direction.items()} for _ in range(n)]
        self._meter.advance_()
        return diagnostics.accuracy(residual, probes)

    def inverse_fisher(self) -> InverseFisher:
        """Return the present Q as a linear operator over the trained parameters, a snapshot.

        Returns:
            The operator, which stays as it is while training goes on.

        Raises:
            ValueError: If groups of parameters have different dampings.
        """
        blocks, dampings = self._runner.plan.blocks, {float(x) for x in self._curvature.damping().values()}
        if len(dampings) > 1:
            raise ValueError(f"damping of groups in {sorted(dampings)} must be one number; give all groups the same")
        return InverseFisher(blocks, self.q, covered(self.model, blocks), dampings.pop())

    @torch.no_grad()
    def statistics(self, inputs: Inputs | None = None, n: int = 8) -> dict[str, float]:
        r"""Return what there is to log, as one flat dict that any logger takes; training is not changed by it.

        Each comes overall, as in ``"fishleg/step_norm"``, and by block, as in ``"fishleg/step_norm/encoder.0"``:

        - ``auxiliary_loss``: :math:`A(\lambda)` before the last update of Q, and each block's terms of it;
        - ``damping``: γ, overall that of the first group of parameters;
        - ``direction_norm``: :math:`\|p\|`, of the last step's direction;
        - ``step_norm``: the length of the last step, without weight decay, at the rate of the block's first parameter;
        - ``accuracy``: as :meth:`accuracy`, where inputs are given; it costs ``2 n`` Fisher products or so.

        ``"fishleg/skipped"`` counts what was left out for non-finite numbers. What has not happened yet is NaN, so that
        the keys are always the same. A compiled step is measured as an eager one is.

        Args:
            inputs: The batch on which the accuracy of Q is measured; ``None``: it is not.
            n: Number of probes.

        Returns:
            Numbers by name.
        """
        rates, scales, norms = self._descent.lengths.unbind()
        by_block = {"direction_norm": norms, "step_norm": rates * scales * norms}
        columns = {
            "auxiliary_loss": self._curvature.losses,
            "damping": torch.stack([self.damping, *self._curvature.damping().values()]),
            **{name: torch.cat((torch.linalg.vector_norm(x)[None], x)) for name, x in by_block.items()},
        }
        measured = None if inputs is None else self.accuracy(inputs, n)
        return {**diagnostics.flat(columns, list(self.q), measured), "fishleg/skipped": float(self.skipped)}

    def report(self) -> diagnostics.Report:
        """Return what is done with every parameter: Q family, shapes, bytes of state, share of FLOPs; printable.

        Returns:
            A :class:`~fishleg_func.diagnostics.Report` with one row for each parameter of the model.
        """
        plan = self._runner.plan
        averages = [self._averages.p, self._averages.m]
        state = {
            k: [*q.parameters(), *q.buffers(), *self._curvature.own(k), *(kept[k] for kept in averages if k in kept)]
            for k, q in self.q.items()
        }
        return diagnostics.report(self.model, plan, self._runner.unhooked, state, self.likelihood)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: hooks belong to one model.

        Raises:
            TypeError: Always, with what to do instead.
        """
        raise TypeError(
            "a FishLegStep must not be copied or pickled: copy or save the model, call fishlegify on the copy, and "
            "load_state_dict(step.state_dict())"
        )

    def __enter__(self) -> Self:
        """Return the step; leaving the block removes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the step."""
        self.remove()


def _detached(batch: tuple[Inputs, Tensor]) -> tuple[Inputs, Tensor]:
    """Return the batch without the caller's autograd graph."""
    detached: tuple[Inputs, Tensor] = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, batch)
    return detached
