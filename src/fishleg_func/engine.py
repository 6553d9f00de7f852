"""The algorithm: from a gradient to new parameters, with all state that is kept between steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import _checks, auxiliary
from ._noise import Noise
from ._resolve import usual_weight_decay
from ._trees import checksum, dense
from ._types import Groups, Hyper, Inputs, Options, Packed, Params
from .batch import Batch, Runner
from .blocks import gaussian
from .capture import restored_on_error, tensors_restored_on_error
from .curvature import Curvature, require_finite
from .descent import Descent
from .likelihoods import Likelihood
from .momentum import A_GRADIENT, Direction, Momentum
from .qmodules import QModule
from .schedule import ALONE, CADENCE, Due, is_due, is_refresh, rate_of, spacing
from .transform import Plan
from .warmup import warmed, warms_up


class Gradient(Protocol):
    """Where a step's gradient comes from: a batch, or what a backward pass has left in the parameters."""

    def gradient(self) -> tuple[Tensor | None, Mapping[str, Packed]]:
        """Return the loss, where it is known, and its gradient by block."""

    def probe(self, q: Mapping[str, QModule]) -> Mapping[str, Packed]:
        """Return the gradient of every block as a probe for λ."""


class Engine:
    """What all front ends share: the algorithm and its state.

    Args:
        runner: Runs batches through the model.
        hyper: Hyperparameters.
        options: What is fixed.
        rule: Moves λ.
        seed: Of the step's own random numbers.
    """

    def __init__(self, runner: Runner, hyper: Hyper, options: Options, rule: auxiliary.Rule, seed: int) -> None:
        self.model, self.hyper = runner.model, hyper
        self._runner, self._options = runner, options
        blocks = runner.plan.blocks
        self._groups = Groups([hyper], {b.name: 0 for b in blocks}, {n: 0 for b in blocks for n in b.names.values()})
        self._curvature = Curvature(runner.plan.q, rule, self._groups, options)
        self.q, self.skipped = self._curvature.q, self._curvature.skipped
        paired = not self._moves_rarely or options.u == "momentum" or options.step_norm == "kl"
        self._averages = Momentum(self._curvature, options.momentum, paired=paired)
        self._direction = self._averages.p
        self._descent = Descent(runner, self._groups, self._averages, options.step_norm)
        self._noise, self._meter = Noise(seed, runner.device), Noise(~seed, runner.device)  # of training, of accuracy()
        self._t = 0  # steps so far
        self._rows = 0  # of the last batch that statistics were due from
        self._updates = 0  # calls of update_aux so far
        self._decay_waits = runner.likelihood is None
        self._removed = False
        weakref.finalize(self, runner.capture.remove)
        if runner.device.type == "cuda":
            self._keep_in_place()

    @property
    def likelihood(self) -> Likelihood | None:
        """The likelihood; ``None`` until it is resolved from the first targets."""
        return self._runner.likelihood

    @property
    def damping(self) -> Tensor:
        r"""γ, 0-d: Q learns :math:`(F + \gamma I)^{-1}`. Before the first batch its relative part is a guess."""
        return self._curvature.dampings()[0]

    def likelihood_tensors(self) -> dict[str, Tensor]:
        """Return what the likelihood learns of its own, by name."""
        return {} if self.likelihood is None else self.likelihood.tensors()

    @property
    def due(self) -> bool:
        """Whether the next step updates Q."""
        return self._due().statistics

    @property
    def plan(self) -> Plan:
        """What is trained, and how."""
        return self._runner.plan

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._t

    @property
    def hypers(self) -> list[Hyper]:
        """Hyperparameters of each group of parameters; the first are :attr:`hyper`."""
        return self._groups.hypers

    def regroup(self, count: int, group_of: Mapping[str, int]) -> None:
        """Give parameters hyperparameters by group.

        Args:
            count: Number of groups.
            group_of: The group of each parameter, by name.
        """
        new = [Hyper(**{k: t.clone() for k, t in vars(self.hyper).items()}) for _ in range(count - 1)]
        self._groups.hypers[1:] = new
        if self._runner.device.type == "cuda":
            self._keep_in_place()
        self._groups.of_parameter.update({name: group_of[name] for name in self._groups.of_parameter})
        self._groups.of_block.update({name: members[0] for name, members in self.groups_of_blocks().items()})

    def groups_of_blocks(self) -> dict[str, list[int]]:
        """Return the groups that each block's parameters are in."""
        blocks = self._runner.plan.blocks
        return {b.name: [self._groups.of_parameter[n] for n in b.names.values()] for b in blocks}

    def pack(self, gradients: Params, factored: Mapping[str, Packed]) -> dict[str, Packed]:
        """Pack gradients by parameter name; blocks of which none is given are left out, else zeros fill in.

        Args:
            gradients: By name, of parameters that are trained.
            factored: By block, in place of these.

        Returns:
            By block.
        """
        params = self._runner.params()
        blocks = [b for b in self._runner.plan.blocks if any(n in gradients for n in b.names.values())]
        names = {n for b in blocks for n in b.names.values()}
        whole = {n: gradients[n] if n in gradients else torch.zeros_like(params[n]) for n in names}
        return {b.name: factored[b.name] if b.name in factored else b.pack(whole) for b in blocks}

    def run(self, inputs: Inputs, targets: Tensor | None, cotangent: Tensor | None = None) -> Batch:
        """Run a batch that Q is to learn from, or its first ``aux_batch_size`` examples.

        Args:
            inputs: What the model is called with.
            targets: Observations, or ``None``.
            cotangent: Gradient of the loss at the outputs, in place of targets.

        Returns:
            The batch.
        """
        size, n = self._options.aux_batch_size, next((len(x) for x in (targets, cotangent) if x is not None), None)

        def cut(x: Any) -> Any:
            return x[:size] if isinstance(x, Tensor) and x.ndim and (n is None or len(x) == n) else x

        if size is not None:
            inputs, targets, cotangent = pytree.tree_map(cut, (inputs, targets, cotangent))
        return self._runner.run(inputs, targets, twice=self._due().learn and self._linear, cotangent=cotangent)

    @property
    def _linear(self) -> bool:
        """Whether updates of λ take products with the Jacobian."""
        return self._options.fisher != "antithetic"

    @property
    def _learns(self) -> bool:
        """Whether λ ever moves."""
        return self._options.update_aux_every != 0

    @property
    def _moves_rarely(self) -> bool:
        """Whether λ moves with the bases only, or never."""
        return not self._learns or (self._options.update_aux_every is None and self._based)

    @property
    def _cadence(self) -> int:
        """Steps between statistics of large batches; by these the refreshes and λ go."""
        return self._options.update_aux_every or CADENCE

    def _spacing(self, rows: int) -> int:
        """Return the steps between statistics of so many rows: fewer only where they serve bases alone."""
        return spacing(rows) if not self._options.update_aux_every and self._based else self._cadence

    @property
    def _based(self) -> bool:
        """Whether all families have a basis."""
        return all(q.has_basis for q in self.q.values())

    def advance(self, source: Gradient, batch_for_q: Callable[[], Batch]) -> None:
        """Take a step along a gradient that was made elsewhere, after :meth:`check`; eager only.

        Args:
            source: The gradient.
            batch_for_q: Returns where the Fisher is taken, called where Q is due.

        Raises:
            FloatingPointError: If the gradient, or the norm of the direction, is not finite; nothing is changed.
        """
        self._sync()
        with restored_on_error(self.model):
            self._advance(source, batch_for_q, self._due())
        self._t += 1

    def check(self) -> None:
        """Raise RuntimeError if the step was removed, or the model is not the one that it was made for."""
        self._require_hooks()
        self._runner.check()

    def inherit(self, other: Engine, *, warm_up: bool) -> None:
        """Take over the state of another, of blocks that both have in the same shape.

        Args:
            other: Where the state comes from.
            warm_up: Whether the schedule begins again, for the sake of blocks that are new.
        """
        other._sync()
        self._t, self._rows = 0 if warm_up else other._t, other._rows
        mine, theirs = self._tensors(), other._tensors()
        for name, tensor in mine.items():
            if name in theirs and theirs[name].shape == tensor.shape:
                tensor.copy_(theirs[name])
        self._curvature.renew()

    def _keep_in_place(self) -> None:
        """Tell the compiler that the state stays where it is, so that CUDA graphs may write into it."""
        hypers = [t for hyper in self._groups.hypers for t in vars(hyper).values()]
        for tensor in (*self._tensors().values(), *hypers, self._curvature.losses, *self._descent.tensors()):
            if not isinstance(tensor, torch.nn.Parameter):  # of these it knows
                torch._dynamo.mark_static_address(tensor)

    def live_state(self) -> dict[str, Any]:
        """Return the state as :meth:`state_dict` does, but the tensors themselves."""
        return {**self._tensors(), "t": self._t, "rows": self._rows, "updates": self._updates}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a state has the names and shapes of this one."""
        _checks.same_state(self.live_state(), state)

    def _fill_in_decay(self, likelihood: Likelihood) -> None:
        """Let weight decay that waits for a likelihood be what suits this one."""
        usual = usual_weight_decay(self._options.step_norm, likelihood)
        for hyper in self.hypers:
            hyper.weight_decay.copy_(torch.where(hyper.weight_decay.isnan(), usual, hyper.weight_decay))

    def _due(self) -> Due:
        """Tell what the next step does; by default λ moves with the bases, if all blocks have one."""
        first = max(self._cadence, ALONE) if self._learns and not self._based else self._cadence
        statistics = is_due(self._t, self._spacing(self._rows), first)
        refresh = statistics and is_refresh(self._t, self._cadence)
        return Due(statistics, refresh, self._learns and (refresh if self._moves_rarely else statistics))

    def _advance(self, source: Gradient, batch_for_q: Callable[[], Batch], due: Due) -> Tensor | None:
        """Take the step: update Q where that is due, average, write the parameters.

        Args:
            source: The gradient.
            batch_for_q: Returns where the Fisher is taken.
            due: From :meth:`_due`.

        Returns:
            In compiled code, whether anything was changed.

        Raises:
            FloatingPointError: If something is not finite; nothing is changed (eager only).
        """
        loss, g = source.gradient()
        rows = self._rows
        if due.statistics:
            direction, ok, rows = self._update_q(source, batch_for_q, due)
        else:
            direction, ok = self._averages.average(loss, g, None)
        self._descent.take(direction, g, ok)
        if ok is not None:
            self.skipped.add_((~ok).long())
        self._noise.advance_()
        self._rows = rows
        return ok

    def _update_q(
        self, source: Gradient, batch_for_q: Callable[[], Batch], due: Due
    ) -> tuple[Direction, Tensor | None, int]:
        """Update Q and its statistics, and the averages; what is written is undone if anything raises.

        Returns:
            The direction, whether anything was changed (in compiled code), and the rows of the batch.
        """
        loss, g = source.gradient()
        ok = require_finite(loss, checksum(g), lambda: A_GRADIENT)
        u = self._probe(source, g) if due.learn else None
        batch = batch_for_q()
        last, rows = batch.last, batch.rows
        with tensors_restored_on_error() as save:
            prepared = self._curvature.prepare(
                batch, u, self._noise, refresh=due.refresh, ok=ok, save=save, rate=rate_of(self._spacing(rows))
            )
            batch.let_go()
            warm = self._options.step_norm == "layer" and warms_up(self._options.warmup_rank, self._t)
            if warm:
                save([*self._direction.values(), *self._averages.m.values()])
            if due.refresh or due.learn:
                save(self._curvature.movable())
                m = self._averages.momentum()  # by the Q that is about to change
                direction, ok = self._averages.follow(loss, g, m, self._curvature.move(prepared))
            else:
                direction, ok = self._averages.average(loss, g, prepared.ok)
            if warm:
                direction = warmed(direction, self.q, last, self._options.warmup_rank, self._t)
            self._curvature.gather(prepared)
        return direction, ok, rows

    def _probe(self, source: Gradient, g: Mapping[str, Packed]) -> Mapping[str, Packed]:
        """Return the direction u on which Q is learned, from a gradient g and where it comes from."""
        if self._options.u == "momentum":
            beta = self._groups.beta
            return {k: torch.lerp(dense(g[k]), m, beta(k)) if k in g else m for k, m in self._averages.m.items()}
        if self._options.u == "gaussian":
            noise = self._noise.fork(3)
            return {k: gaussian(p, noise, i) for i, (k, p) in enumerate(self._direction.items())}
        return source.probe(self.q)

    def _sync(self) -> None:
        """Take up what was written into ``q`` from outside since the last eager call."""
        changed = self._curvature.changed()
        m = self._averages.momentum(changed)
        self._curvature.renew(changed)
        self._averages.renew(m)

    def _require_hooks(self) -> None:
        if self._removed:
            raise RuntimeError("this step was removed from its model, and must not be used; call fishlegify again")

    def _tensors(self) -> dict[str, Tensor]:
        """Return all state that is kept between steps, by name: the tensors themselves."""
        hyper = {f"hyper.{k}": t for k, t in vars(self.hyper).items()}
        direction = {f"direction.{k}": p for k, p in self._direction.items()}
        momentum = {f"momentum.{k}": m for k, m in self._averages.m.items()}
        likelihood = {f"likelihood.{k}": t for k, t in self.likelihood_tensors().items()}
        rest = {"noise": self._noise.counter, "skipped": self.skipped}
        return {**hyper, **self._curvature.tensors(), **direction, **momentum, **likelihood, **rest}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return everything that the step keeps: λ, bases, momentum, hyperparameters, counters, random numbers.

        The model's own state is in the model's ``state_dict``. With both restored (and the global random stream, where
        the model draws from it) training goes on bit for bit.

        Returns:
            Copies of tensors by name, and three integers; ``torch.load(..., weights_only=True)`` reads it.
        """
        self._sync()
        return {k: t.detach().clone() if isinstance(t, Tensor) else t for k, t in self.live_state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, onto this step's device.

        Args:
            state: From a step made with the same model and arguments.

        Raises:
            ValueError: If names or shapes differ; nothing is changed.
        """
        self.check_state(state)
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self._decay_waits = bool(self.hyper.weight_decay.isnan())
        self._t, self._rows, self._updates = (int(state[k]) for k in ("t", "rows", "updates"))
        self._curvature.adopt()
        self._averages.forget()

    def remove(self) -> None:
        """Take the hooks off the model, which is then as it was before ``fishlegify``."""
        self._runner.capture.remove()
        self._removed = True
