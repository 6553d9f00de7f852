"""The front end in the form of a ``torch.optim.Optimizer``; it computes nothing itself."""

from __future__ import annotations

import glob
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn

from . import _checks
from ._resolve import usual_weight_decay
from ._types import Packed
from .batch import Batch
from .capture import kept_random_state, set_random_state
from .diagnostics import Report
from .entry import fishlegify, set_damping
from .feed import Feed
from .layer_watch import LayerWatch
from .left_gradient import LeftGradient
from .original_call import Start, translate
from .step import FishLegStep
from .transform import select, unwrapped
from .watch import Watch, join

_DEFAULTS = {"lr": 3e-2, "weight_decay": None, "damping": None}


class FishLeg(torch.optim.Optimizer):
    r"""FishLeg as an optimizer: ``loss.backward(); optimizer.step()``, with the algorithm of :func:`fishlegify`.

    Gradients are those in ``p.grad``, which are only read; layers without any stay. Q learns from the batches that
    passed through the model, and back, since the last step or ``zero_grad``, joined along their first axis to one, or
    from those of ``aux_loader``: in a step that updates
    Q (see ``update_aux_every``) the model is run once more on them, and changes nothing by it.

    Args:
        model: Any module. The training loop must call it as it is; where it calls one wrapped by ``torch.compile``,
            pass that one.
        likelihood: What the model's outputs are the natural parameters of. The loss should be its ``nll``; another
            factor before it matters only without a ``step_norm``.
        nll: Part of the original's call only, ``FishLeg(model, draw, nll, aux_loader, ...)``.
        aux_loader: Batches for Q, one for each update, begun again when exhausted: pairs of inputs and targets, or
            dicts of keyword arguments.
        params: Parameters of the model, named or not, or groups of them; ``None`` for all. Groups may have their own
            ``lr``, ``weight_decay``, ``damping``, ``betas`` (of which there is one) and ``maximize``.
        maximize: Climb instead of descending.
        **options: Every other argument of :func:`fishlegify`, with the same meaning.

    Attributes:
        fishleg: The :class:`FishLegStep` behind it, for ``accuracy``, ``natural_gradient``, ``q`` and what else it has.

    Raises:
        TypeError: If an argument is unknown, or there is no likelihood.
        ValueError: If an argument is out of its range, or a parameter is not the model's.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> optimizer = ff.FishLeg(
        ...     model, ff.likelihoods.Gaussian(), lr=1.0, beta=0.0, damping=1e-12, step_norm=None, update_aux_every=0
        ... )
        >>> ff.likelihoods.Gaussian().nll(model(x), 3 * x).backward()
        >>> optimizer.step()
        >>> round(model.weight.item(), 4)
        3.0

    References:
        Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia & Hennequin, "Fisher-Legendre (FishLeg) optimization of deep
        neural networks", ICLR 2023.
    """

    fishleg: FishLegStep

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any = None,
        nll: Any = None,
        aux_loader: Iterable[Any] | None = None,
        *,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        likelihood, aux_loader, options, start = translate(model, likelihood, nll, aux_loader, options)
        if likelihood is None:
            raise TypeError(
                "likelihood=None must be given: an optimizer never sees the targets from which it could be resolved; "
                "pass one such as fishleg_func.likelihoods.Categorical()"
            )
        if params is not None and not options.keys().isdisjoint({"include", "exclude"}):
            raise TypeError("params= must not be given together with include= or exclude=; choose by one of them")
        if options.get("fisher") == "empirical" and aux_loader is None:
            raise ValueError("fisher='empirical' needs targets, and an optimizer sees none; pass aux_loader=")
        if params is None:
            where = (options.pop("include", None), options.pop("exclude", None))
            params = list(select(unwrapped(model), *where)[0].items())
        defaults = {**_DEFAULTS, "betas": (options.pop("beta", 0.9),), "maximize": maximize}
        defaults |= {name: options.pop(name) for name in _DEFAULTS if name in options}
        if defaults["weight_decay"] is None:
            defaults["weight_decay"] = usual_weight_decay(options.get("step_norm", "layer"), likelihood)
        self._called, self._likelihood, self._options, self._start = model, likelihood, options, start
        self._feed = None if aux_loader is None else Feed(aux_loader)
        self._ready = False
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        own = likelihood.tensors()
        super().__init__([*groups, {"params": list(own.items())}] if own else groups, defaults)
        self._build()

    def _build(self) -> None:
        """Make the step for the parameters that are in groups now; if that fails, nothing is changed."""
        _checks.no_parallel_wrapper(self._called)
        model = unwrapped(self._called)
        names = {p: name for name, p in model.named_parameters()}
        own = set(self._likelihood.tensors().values())
        every = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p not in own]
        if any(p not in names for p, _ in every):
            raise ValueError("params: every parameter must be one of the model's; pass model.parameters(), or some")
        group_of = {names[p]: i for p, i in every}
        include = [glob.escape(name) for name in group_of]
        fishleg = fishlegify(model, self._likelihood, include=include, **self._options)
        try:
            fishleg.regroup(len(self.param_groups), group_of)
            self._adopt(fishleg)
        except BaseException:
            fishleg.remove()
            raise
        me = weakref.ref(self)  # hooks live with the model, and must not keep the optimizer

        def watching() -> bool:
            optimizer = me()
            return optimizer is not None and optimizer._watching()

        self.fishleg, self._trained = fishleg, self._trainable()
        layers = LayerWatch(fishleg.plan.blocks, fishleg.plan.layers)
        self._watch = Watch(self._called, self._options.get("output"), watching, layers)
        weakref.finalize(self, self._watch.remove)
        self._first = every[0][0]
        self._ready = True
        self._expose()

    def _rebuild(self, *, warm_up: bool) -> None:
        """Make the step anew where other parameters are to be trained; what was learned of the others is kept."""
        before, watch = self.fishleg, self._watch
        self._build()
        self._watch.take_over(watch)
        before.remove()
        self.fishleg.inherit(before, warm_up=warm_up)
        self._expose()

    def _trainable(self) -> frozenset[Tensor]:
        return frozenset(p for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _watching(self) -> bool:
        """Tell whether the next step needs what passes through the model."""
        return (self._feed is None and self.fishleg.due) or bool(self.fishleg.likelihood_tensors())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients in ``p.grad``.

        Args:
            closure: Evaluates the model anew and returns the loss, with gradients left in the parameters.

        Returns:
            What the closure returns.

        Raises:
            FloatingPointError: If a gradient, or the norm of the direction, is not finite; nothing is changed.
            RuntimeError: If Q is to be updated, and no batch has passed through the model since the last step; or where
                several processes train.
            ValueError: If a group holds a value out of its range, or a gradient is sparse.
        """
        _checks.one_process()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._trainable() != self._trained:
            self._rebuild(warm_up=False)
        self.fishleg.check()
        self._adopt(self.fishleg)
        g = self._gradients()
        if g:
            self._advance(g)
            self._learn()
            if self._feed is not None:
                self._feed.used()
        self._watch.forget()
        return loss

    def _advance(self, g: dict[str, Packed]) -> None:
        """Take the step, and before the first one what the original's call asks for; undone if anything raises."""
        start = None if self.fishleg.steps else self._start
        before = self.fishleg.state_dict() if start is not None else {}
        source = LeftGradient(g, self.batch, whole=self._options.get("aux_batch_size") is None)
        try:
            with torch.autocast(self._first.device.type, enabled=False):
                if start is not None:
                    self._begin(start)
                self.fishleg.advance(source, source.batch)
        except BaseException:
            if start is not None and self._feed is not None:
                self.fishleg.load_state_dict(before)
                self._feed.resume(0)
            raise

    def _adopt(self, fishleg: FishLegStep) -> None:
        """Bring what the groups say into force."""
        for group in self.param_groups:
            _checks.group(group)
        for group, hyper in zip(self.param_groups, fishleg.hypers, strict=True):
            for value, tensor in (
                (group["lr"], hyper.lr), (group["weight_decay"], hyper.weight_decay), (group["betas"][0], hyper.beta),
            ):  # fmt: skip
                tensor.fill_(float(value))
            set_damping(hyper, group["damping"])
        _checks.groups_agree(fishleg.groups_of_blocks(), self.param_groups)

    def _gradients(self) -> dict[str, Packed]:
        """Return the gradient by block; blocks without any are left out."""
        signs = {p: -1 if group["maximize"] else 1 for group in self.param_groups for p in group["params"]}
        params = {name: p for name, p in self.fishleg.model.named_parameters() if p in signs}
        sparse = [name for name, p in params.items() if p.grad is not None and p.grad.layout != torch.strided]
        if sparse:
            raise ValueError(f"the gradients of {sparse} must be dense; make the embeddings with sparse=False")
        grads = {n: p.grad if signs[p] > 0 else -p.grad for n, p in params.items() if p.grad is not None}
        return self.fishleg.pack(grads, self._watch.layers.factors(grads))

    def _begin(self, start: Start) -> None:
        """Scale Q and let it learn, as the original's call asks for."""
        assert self._feed is not None
        for module in self.fishleg.q.values():
            module.scale_(start.scale)
        for _ in range(start.updates):
            self.fishleg.update_aux(*self._feed.next())
            self._feed.used()

    def _learn(self) -> None:
        """Let the likelihood learn its own parameters, at the rate of their group, and clear their gradients."""
        own, passes = self._likelihood.tensors(), self._watch.passes()
        if own and passes and passes[-1].outputs is not None:
            last = passes[-1]
            member = next(iter(own.values()))
            i = next(i for i, group in enumerate(self.param_groups) if any(p is member for p in group["params"]))
            sign = -1 if self.param_groups[i]["maximize"] else 1
            weight = None if last.cotangent is None else self._likelihood.weight_seen(last.outputs, last.cotangent)
            self._likelihood.learn_from_gradient_(last.outputs, sign * self.fishleg.hypers[i].lr, weight)
        for tensor in own.values():
            tensor.grad = None

    def batch(self) -> Batch:
        """Run the model on the batch that Q is to learn from.

        Returns:
            The batch.

        Raises:
            RuntimeError: If none has passed through the model since the last step.
        """
        fishleg = self.fishleg
        if self._feed is not None:
            inputs, targets = self._feed.next()
            with kept_random_state(fishleg.model):
                return fishleg.run(inputs, targets)
        passes = self._watch.passes()
        if not passes:
            raise RuntimeError(
                "Q is to be updated, and no forward pass of the model, with a backward pass behind it, was seen since "
                "the last step; call the model that was given to FishLeg (a compiled one if that is what you call), or "
                "pass aux_loader="
            )
        whole = join(passes)
        _checks.gradient_was_seen(whole.cotangent)
        with kept_random_state(fishleg.model):
            set_random_state(whole.state)
            return fishleg.run(whole.call, None, whole.cotangent)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget the batches behind them.

        Args:
            set_to_none: Whether to set them to ``None`` instead of to zero.
        """
        super().zero_grad(set_to_none)
        self._watch.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model that are not trained yet; Q of the others is kept, and warms up again.

        Args:
            param_group: As in torch.

        Raises:
            ValueError: If a parameter is not the model's; nothing is changed.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        super().add_param_group(self._named(param_group))
        try:
            self._rebuild(warm_up=True)
        except BaseException:
            self.param_groups.pop()
            raise

    def _named(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """Return a group with names where the groups have them, and without where they have not."""
        params = param_group["params"]
        listed = [params] if isinstance(params, Tensor) else list(params)
        names: dict[Any, str] = {p: name for name, p in unwrapped(self._called).named_parameters()}
        plain = [p[1] if isinstance(p, tuple) else p for p in listed]
        if "param_names" in self.param_groups[0]:
            return {**param_group, "params": [(names.get(p, ""), p) for p in plain]}
        return {**param_group, "params": plain}

    def report(self) -> Report:
        """Return what is done with every parameter; printable.

        Returns:
            As :meth:`FishLegStep.report`.
        """
        return self.fishleg.report()

    def remove(self) -> None:
        """Take all hooks off the model, which is then as it was before."""
        self._watch.remove()
        self.fishleg.remove()

    def _expose(self) -> None:
        """Show the state where torch keeps it: all at the first parameter, as blocks are no parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": self.fishleg.steps}  # distributed checkpoints want an entry for each
        position = {} if self._feed is None else {"aux_position": self._feed.position}
        self.state[self._first] |= {**self.fishleg.live_state(), **position}

    def state_dict(self) -> dict[str, Any]:
        """Return everything: λ, bases, momentum, counters, random numbers, the position in ``aux_loader``; groups.

        Returns:
            Copies, in the form of torch's optimizers; ``torch.load(..., weights_only=True)`` reads it.
        """
        self._expose()
        packed = super().state_dict()
        state = {
            i: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in of.items()}
            for i, of in packed["state"].items()
        }
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, in full precision and on the devices of the model.

        Args:
            state_dict: From an optimizer of the same model, groups and arguments.

        Raises:
            ValueError: If it does not fit; nothing is changed.
        """
        found = [{k: v for k, v in of.items() if k != "step"} for of in state_dict["state"].values()]
        found = [of for of in found if of]
        if len(found) != 1:
            raise ValueError(
                f"the state has {len(found)} entries and must have 1; it must come from FishLeg.state_dict"
            )
        position = found[0].pop("aux_position", None)
        if (position is None) != (self._feed is None):
            raise ValueError(
                "the state must come from an optimizer with aux_loader= where this one has it, and without"
            )
        self.fishleg.check_state(found[0])
        super().load_state_dict({**state_dict, "state": {}})
        self.fishleg.load_state_dict(found[0])
        if self._feed is not None:
            self._feed.resume(int(position))
        self._expose()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: hooks belong to one model.

        Raises:
            TypeError: Always, with what to do instead.
        """
        raise TypeError(
            "FishLeg must not be copied or pickled: copy or save the model, make an optimizer for the copy, and "
            "load_state_dict(optimizer.state_dict())"
        )
