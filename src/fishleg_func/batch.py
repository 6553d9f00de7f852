"""One batch run through the model: loss, gradient, random gradient and Fisher products from one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import _checks, diagnostics, fisher
from ._noise import Noise
from ._resolve import resolve
from ._trees import checksum, dense, square_checksum
from ._types import Inputs, Linearization, Packed, Params
from .blocks import Packing
from .capture import Capture, Slots, StaleSlots, kept_random_state, restored_on_error
from .likelihoods import Likelihood
from .qmodules import QModule
from .transform import Plan

PackedMap = Callable[[Mapping[str, Packed]], Mapping[str, Packed]]


class Runner:
    """Runs batches through a model; holds what is learned about it at the first batch.

    Args:
        model: The model.
        plan: Its plan.
        likelihood: The likelihood, or ``None`` to resolve it from the first targets.
        output: From what the model returns to natural parameters.
        device: Where the model is.
        probes: Whether gradients are probes for λ, and what they were packed from is kept until these are made.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        likelihood: Likelihood | None,
        output: Callable[[Any], Tensor] | None,
        device: torch.device,
        *,
        probes: bool,
    ) -> None:
        self.probes = probes
        self.model, self.plan, self.likelihood, self.output, self.device = model, plan, likelihood, output, device
        self.capture = Capture(model, plan.layers, plan.keep(), output)
        self.unhooked: frozenset[str] = frozenset()  # layers whose hooks do not fire, or do not tell the whole gradient
        self._verified: set[tuple[Any, ...]] = set()  # kinds of inputs at which it was compared with autograd
        self._traits = _checks.traits(model)
        names = [name for block in plan.blocks for name in block.names.values()]
        self._places = {name: (path, local) for name in names for path, _, local in [name.rpartition(".")]}

    def params(self, without: Collection[str] = ()) -> Params:
        """Return the trained parameters but for some, looked up in the model now: replaced ones are found."""
        wanted = {name: place for name, place in self._places.items() if name not in without}
        modules = {path: self.model.get_submodule(path) for path in {path: None for path, _ in wanted.values()}}
        params = {name: modules[path]._parameters[local] for name, (path, local) in wanted.items()}
        return {name: p.detach() for name, p in params.items() if p is not None}

    def check(self) -> None:
        """Raise RuntimeError unless the model is the one that was planned for."""
        _checks.unchanged_model(self.model, self._traits, self.plan.layers)

    def run(self, inputs: Inputs, targets: Tensor | None, *, twice: bool, cotangent: Tensor | None = None) -> Batch:
        """Run the model once on a batch, after checking it.

        Args:
            inputs: What the model is called with.
            targets: Observations, or ``None``.
            twice: Whether Fisher products will be asked for.
            cotangent: Gradient of the loss at the outputs, where there are no targets but a backward pass was seen.

        Returns:
            The batch.

        Raises:
            ValueError: If something is on another device, or targets do not fit the likelihood, or it is not known yet.
            TypeError: If output or targets have a wrong type.
            RuntimeError: If autocast is on, the model is not the one that was planned for, or ``torch.func`` cannot
                differentiate it.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise RuntimeError(
                "autocast is on, and must be off in a step: leave its context, and convert the model instead"
            )
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        leaves = [(f"inputs[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(inputs))]
        _checks.same_device(self.device, [*leaves, ("targets", targets)])
        self.check()
        if torch.compiler.is_compiling():
            return self._run(inputs, targets, self.capture.discover(inputs), twice, cotangent)
        try:
            with restored_on_error(self.model):
                slots = self.capture.discover(inputs)
                self._verify(inputs, slots)
                return self._run(inputs, targets, slots, twice, cotangent)
        except StaleSlots:  # the calls of a layer depend on values or on chance: look at this very batch
            return self._run(inputs, targets, self.capture.discover(inputs, anew=True), twice, cotangent)
        except RuntimeError as error:
            _checks.differentiable_by_func(error)
            raise

    def _run(
        self, inputs: Inputs, targets: Tensor | None, slots: Slots, twice: bool, cotangent: Tensor | None
    ) -> Batch:
        slots = {name: calls for name, calls in slots.items() if name not in self.unhooked}
        hooked = {name for b in self.plan.blocks if b.name in slots for name in b.names.values()}
        lin, seen = self.capture.linearize(inputs, self.params(hooked), slots, twice=twice)
        if not torch.compiler.is_compiling() and seen.keys() != slots.keys():
            raise StaleSlots(
                f"the layers {sorted(slots.keys() - seen.keys())} were called just before, and now are not"
            )
        return Batch(self, inputs, targets, lin, Packing(self.plan.blocks, seen, slots), cotangent, twice)

    def likelihood_for(self, outputs: Tensor, targets: Tensor | None) -> Likelihood:
        """Return the likelihood, resolved and checked against the targets where there are any."""
        if targets is None:
            if self.likelihood is None:
                raise ValueError(
                    "likelihood=None must be resolved before a call without targets: take one step, or pass one"
                )
            return self.likelihood
        likelihood = self.likelihood or resolve(outputs, targets)
        likelihood.check_shapes(outputs, targets)
        if not torch.compiler.is_compiling():
            likelihood.check_values(outputs, targets)
        return likelihood

    def settle(self, batch: Batch) -> None:
        """Keep the likelihood that a batch resolved, once it is known to be a good one."""
        if self.likelihood is None:
            self.likelihood = batch.likelihood
            if not torch.compiler.is_compiling():
                diagnostics.log_resolved(batch.likelihood)

    def _verify(self, inputs: Inputs, slots: Slots) -> None:
        """Find the layers whose captured gradient is not autograd's, once for each kind of inputs.

        Their weights are used outside of their call, or the hook does not fire; autograd's gradient is taken for them.
        """
        key = self.capture.key(inputs)
        if key in self._verified:
            return
        _checks.no_backward_hooks(self.model)
        with kept_random_state(self.model):
            lin, seen = self.capture.linearize(inputs, self.params(), slots, twice=False)
        pulled = lin.pullback(Noise(0, self.device).normal(lin.outputs))
        captured = Packing(self.plan.blocks, seen, slots).gradients(pulled)
        truth = {block.name: block.pack(pulled[1]) for block in self.plan.blocks}
        if not checksum(truth).isfinite():
            return  # nothing can be told from this batch; the step will refuse it
        silent = self.plan.layers.keys() - slots.keys()
        wrong = {name for name in slots if _differ(dense(captured[name]), truth[name], slots[name][0].dtype)}
        self.unhooked |= silent | wrong
        self._verified.add(key)


def _differ(captured: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether two gradients differ by more than arithmetic in ``dtype`` explains."""
    relative = max(10 * torch.finfo(truth.dtype).eps ** 0.5, 16 * torch.finfo(dtype).eps)
    tolerance = relative * torch.linalg.vector_norm(truth)
    return not bool(torch.linalg.vector_norm(captured - truth) <= tolerance)


class Batch:
    """A batch after its forward pass; made by :meth:`Runner.run`.

    Args:
        runner: What ran it.
        inputs: What the model was called with.
        targets: Observations, or ``None``.
        lin: The linearization in layer outputs and direct parameters.
        packing: How its results are packed.
        cotangent: Gradient of the loss at the outputs, where there are no targets.
        twice: Whether a Fisher product will be asked for, which can share the gradient's pass back.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: Inputs,
        targets: Tensor | None,
        lin: Linearization,
        packing: Packing,
        cotangent: Tensor | None,
        twice: bool,
    ) -> None:
        self._twice = twice
        self._runner, self._inputs, self._targets, self._lin, self._packing = runner, inputs, targets, lin, packing
        self.buffers = lin.buffers
        self._loss_and_gradient: tuple[Tensor | None, dict[str, Packed]] | None = None
        self._pulled: Any = None  # what the gradient was packed from, until the probe is
        self._probe: dict[str, Packed] | None = None
        self.likelihood = runner.likelihood_for(lin.outputs, targets)
        self._cotangent = None if cotangent is None else cotangent.to(lin.outputs)  # from autocast, a lower dtype

    def _weight(self) -> Tensor:
        """Return each term's weight, from the targets or from what the gradient at the outputs tells of them."""
        if self._cotangent is None:
            return self.likelihood.weight(self._lin.outputs, self._targets)
        return self.likelihood.weight_seen(self._lin.outputs, self._cotangent)

    @property
    def has_gradient(self) -> bool:
        """Whether there are targets, or what a backward pass has told."""
        return self._targets is not None or self._cotangent is not None

    @property
    def rows(self) -> int:
        """Number of terms of the loss, masked ones with them."""
        outputs = self._lin.outputs
        events = self.likelihood.event_dims(outputs)
        return math.prod([n for i, n in enumerate(outputs.shape) if i not in events])

    @property
    def last(self) -> str | None:
        """Name of the hooked layer whose first call came last; for as long as the model's graph is kept."""
        return next(reversed(self._packing.slots), None)

    def gradient(self) -> tuple[Tensor | None, dict[str, Packed]]:
        """Return the loss, where it is known, and its gradient by block; computed once."""
        if self._loss_and_gradient is None:
            self._loss_and_gradient = self._gradient()
        return self._loss_and_gradient

    def loss(self) -> Tensor:
        """Return the loss of the targets, without its gradient: 0-d."""
        assert self._targets is not None
        return self.likelihood.nll(self._lin.outputs, self._targets)

    def _gradient(self) -> tuple[Tensor | None, dict[str, Packed]]:
        cotangent, loss = self._cotangent, None
        if cotangent is None:
            cotangent, loss = torch.func.grad_and_value(self.likelihood.nll)(self._lin.outputs, self._targets)  # type: ignore[arg-type]
        pullback = self._lin.shared if self._twice else self._lin.pullback
        pulled = pullback(cotangent)
        self._pulled = pulled if self._runner.probes else None
        return loss, self._packing.gradients(pulled)

    def let_go(self) -> None:
        """Drop the model's graph and what its layers saw, once all products and the gradient have been made of them."""
        self._lin = self._lin._replace(pullback=_let_go, pushforward=_let_go, shared=_let_go)
        self._packing, self._pulled = Packing((), {}, {}), None

    def learn_likelihood_(self, rate: Tensor, ok: Tensor | None) -> None:
        """Let the likelihood learn its own parameters, from the outputs and targets of this batch.

        Args:
            rate: η, 0-d.
            ok: In compiled code, whether to change anything.
        """
        if self._targets is not None:
            self.likelihood.learn_(self._lin.outputs, self._targets, rate, ok)

    def probe(self, q: Mapping[str, QModule]) -> dict[str, Packed]:
        """Return the gradient as a probe for λ, in long layers estimated from some of its rows."""
        _, g = self.gradient()
        if self._probe is None:
            self._probe = self._packing.probe(self._pulled, g, q)
            self._pulled = None
        return self._probe

    def random_gradient(
        self, q: Mapping[str, QModule], noise: Noise
    ) -> tuple[dict[str, Packed], Tensor, Tensor, Tensor]:
        r"""Draw what statistics of the Fisher are made of.

        Args:
            q: Q modules.
            noise: Source of the draw.

        Returns:
            For the blocks with a basis a draw z, :math:`E[zz^\top] = F`; the mean diagonal entry of the Fisher of the
            outputs, 0-d; a number that is finite only if that and the squares of z are; and whether there are terms.
        """
        outputs = self._lin.outputs
        weight = self._weight()
        scores = weight.sqrt() * self.likelihood.score(outputs, noise)
        events = math.prod([outputs.shape[i] for i in self.likelihood.event_dims(outputs)])
        level = scores.square().sum() / events
        any_terms = weight.sum() > 0
        if not any(module.has_basis for module in q.values()):
            return {}, level, level, any_terms
        z = self._packing.statistics(self._lin.pullback(scores), q)
        return z, level, level + square_checksum(z), any_terms

    def fisher(self, kind: str, noise: Noise) -> PackedMap:
        r"""Return :math:`v \mapsto Fv` over all blocks.

        Args:
            kind: Of the product, see :func:`fishleg_func.fisher_vector_product`.
            noise: Source of its draws.
        """
        params = self._runner.params()
        if kind == "antithetic":
            return self._antithetic(params, noise)
        output_fisher = fisher.make_output_fisher(
            kind, self.likelihood, self._lin.outputs, self._weight(), self._targets, noise
        )

        def product(v: Mapping[str, Packed]) -> Mapping[str, Packed]:
            moved = self._lin.pushforward(*self._packing.tangents(v, params))
            return self._packing.gradients(self._lin.pullback(output_fisher(moved)))

        return product

    def _antithetic(self, params: Params, noise: Noise) -> PackedMap:
        blocks = self._runner.plan.blocks
        model, output = self._runner.model, self._runner.output
        gradient = fisher.make_sampled_gradient(
            model, self.likelihood, self._inputs, self._targets, params, output, noise
        )

        def product(v: Mapping[str, Packed]) -> Mapping[str, Packed]:
            moved: Params = {}
            for block in blocks:
                moved |= block.unpack(dense(v[block.name]), params)
            fv = fisher.antithetic_product(gradient, params, moved)
            return {block.name: block.pack(fv) for block in blocks}

        return product


def _let_go(*args: Any) -> Any:
    raise AssertionError("the graph of this batch was let go")
