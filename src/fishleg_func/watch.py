"""Watching a training loop: which batches passed through the model on the way to the gradients in its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ._types import Call
from .capture import RandomState, random_state
from .layer_watch import LayerWatch, is_batched, is_training_pass


class Pass:
    """One forward pass of a training loop.

    Args:
        call: What the model was called with, detached.
        state: The global random streams before it.
        reached: Where it enters itself once a backward pass has come by.

    Attributes:
        outputs: Natural parameters, detached; ``None`` where they could not be told.
        cotangent: Gradient of the loss at the outputs, once a backward pass has come by.
    """

    def __init__(self, call: Call, state: RandomState, reached: list[Pass]) -> None:
        self.call, self.state, self._all_reached = call, state, reached
        self.outputs: Tensor | None = None
        self.cotangent: Tensor | None = None

    @property
    def reached(self) -> bool:
        """Whether a backward pass has come by."""
        return any(p is self for p in self._all_reached)

    def touch(self, gradient: Tensor) -> None:
        """Note that a backward pass has reached something that the model returned."""
        if not self.reached and not is_batched(gradient):
            self._all_reached.append(self)

    def take(self, gradient: Tensor) -> None:
        """Note the gradient at the outputs; where there are several backward passes, their sum."""
        if is_batched(gradient):
            return
        self.touch(gradient)
        gradient = gradient.detach()
        self.cotangent = gradient if self.cotangent is None else self.cotangent + gradient


class Watch:
    """The hooks on a model, inert while nobody wants to know, and in copies of the model.

    Args:
        model: The module that the training loop calls.
        output: From what it returns to natural parameters.
        wanted: Tells whether passes are to be kept now.
        layers: The hooks on its layers.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Callable[[Any], Tensor] | None,
        wanted: Callable[[], bool],
        layers: LayerWatch,
    ) -> None:
        self._model, self._output, self._wanted, self.layers = model, output, wanted, layers
        self._states: list[RandomState | None] = []  # at the start of calls that have not returned
        self._passes: list[weakref.ref[Pass]] = []  # the hooks hold them: each lives as long as its graph,
        self._reached: list[Pass] = []  # or, once a backward pass has come by, until the step
        self._handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def passes(self) -> list[Pass]:
        """Return the forward passes that a backward pass has reached, oldest first."""
        return [p for ref in self._passes if (p := ref()) is not None and p.reached]

    def forget(self) -> None:
        """Drop those passes; what was run forward, and not yet backward, stays while its graph does."""
        self._passes = [ref for ref in self._passes if (p := ref()) is not None and not p.reached]
        self._reached.clear()
        self.layers.forget()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._passes = []
        self._reached.clear()
        self.layers.remove()

    def take_over(self, other: Watch) -> None:
        """Take the place of another on the same model, with the passes that it has seen."""
        self._passes, self._reached = list(other._passes), other._reached
        other._reached = []
        other.remove()

    def __reduce__(self) -> tuple[Callable[[], Watch], tuple[()]]:
        """Become an inert one in a copy of the model."""
        return _inert, ()

    def _idle(self) -> bool:
        return not is_training_pass() or not self._wanted()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states.append(None if self._idle() else random_state(module))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        state = self._states.pop() if self._states else None
        if state is None or self._states or self._idle():  # inner calls of a model that calls itself are parts
            return
        seen = Pass(_copied(Call(args, kwargs)), state, self._reached)
        natural = out if self._output is None else self._output(out)
        leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad and t is not natural]
        if isinstance(natural, Tensor) and natural.requires_grad:
            _on_gradient(natural, seen.take)
            seen.outputs = natural.detach()
        for leaf in leaves:
            leaf.register_hook(seen.touch)  # type: ignore[no-untyped-call]
        self._passes.append(weakref.ref(seen))


def _inert() -> Watch:
    return Watch(nn.Identity(), None, bool, LayerWatch((), {}))


def _on_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call a hook with the gradient at a tensor, or at what it is a copy of in another dtype.

    Accelerate casts what a model returns to float32 after the model has computed its loss: the copy has no gradient.
    """
    node, index = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name() == "ToCopyBackward0" and node.next_functions[0][0] is not None:
        node, index = node.next_functions[0]
    if node is None or node is tensor.grad_fn:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return

    def before(gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[index]
        if gradient is not None:
            hook(gradient)

    node.register_prehook(before)


def _copied(call: Call) -> Call:
    """Return a call as it is now: the loop may write the next batch into the same tensors."""
    copied: Call = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, call)
    return copied


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or bool(a == b)


def join(passes: Sequence[Pass]) -> Pass:
    """Return several passes as one of a larger batch, joined along first axes; where that cannot be, the last of them.

    Args:
        passes: At least one.

    Returns:
        A pass whose tensors with a first dimension of examples are those of all passes, one after the other.
    """
    last = passes[-1]
    flat: list[tuple[list[Any], Any]] = [pytree.tree_flatten(p.call) for p in passes]
    counts = [None if p.outputs is None or p.outputs.ndim == 0 else len(p.outputs) for p in passes]
    if len(passes) == 1 or None in counts or any(structure != flat[-1][1] for _, structure in flat):
        return last
    leaves = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        if all(isinstance(x, Tensor) and x.ndim and len(x) == n for x, n in zip(column, counts, strict=True)):
            if any(x.shape[1:] != column[0].shape[1:] for x in column):
                return last
            leaves.append(torch.cat(column))
        elif any(not _same(x, column[-1]) for x in column):
            return last
        else:
            leaves.append(column[-1])
    whole = Pass(pytree.tree_unflatten(leaves, flat[-1][1]), last.state, [])
    cotangents = [p.cotangent for p in passes if p.cotangent is not None]
    if len(cotangents) == len(passes):
        whole.cotangent = torch.cat(cotangents)
    return whole
