"""How the outputs of a linearized model move: the transpose of a pass back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._types import Params

Seen = dict[str, list[Tensor]]
Tangent = Callable[[], Tensor]
Moved = dict[str, list[Tangent]]


def pushforward_of(pullback: Callable[[Tensor], Any], outputs: Tensor) -> Callable[[Any], Tensor]:
    r"""Return :math:`v \mapsto Jv` as the transpose of the linear map :math:`c \mapsto J^\top c`.

    Args:
        pullback: From ``torch.func.vjp``.
        outputs: What was differentiated.
    """

    def pushforward(tangent: Any) -> Tensor:
        pulled, transpose = torch.func.vjp(pullback, torch.zeros_like(outputs))  # type: ignore[misc]
        result: Tensor = transpose(_ordered_like(pulled, tangent), retain_graph=False)[0]
        return result

    return pushforward


class Pushforward:
    """What :func:`pushforward_of` returns, for a pullback to the outputs of layers and to direct parameters.

    It is made of a pass back, which may be one that is wanted anyway, see :meth:`pull`. In eager code a layer's tangent
    is made when the transposed pass comes by there, and added to what it brings: neither the tangents nor what was
    pulled back are ever there all at once.

    Args:
        pullback: From ``torch.func.vjp``.
        outputs: What was differentiated.
    """

    def __init__(self, pullback: Callable[[Tensor], tuple[Seen, Params]], outputs: Tensor) -> None:
        self._pullback, self._outputs = pullback, outputs
        self._moved: Moved = {}  # not self, which holds the graph, but this is what hooks in the graph hold
        self._passed: tuple[tuple[Seen, Params], Callable[..., tuple[Tensor]]] | None = None

    def pull(self, cotangent: Tensor) -> tuple[Seen, Params]:
        """Return what the pullback does, and keep its graph for the next pushforward."""
        moved, compiled = self._moved, torch.compiler.is_compiling()

        def meet(name: str, i: int, delta: Tensor) -> Tensor:
            if compiled:
                return delta
            if delta.requires_grad:
                delta.register_hook(lambda gradient: gradient + moved[name][i]())  # type: ignore[no-untyped-call]
            return delta.sum()  # depends on all of delta, and does not hold it

        def run(c: Tensor) -> Any:
            pulled = self._pullback(c)
            met = {name: [meet(name, i, d) for i, d in enumerate(ds)] for name, ds in pulled[0].items()}
            return (met, pulled[1]), pulled

        met, transpose, pulled = torch.func.vjp(run, cotangent, has_aux=True)  # type: ignore[misc]
        self._passed = met, transpose
        return pulled  # type: ignore[no-any-return]

    def __call__(self, moved: Moved, direct: Params) -> Tensor:
        """Return how the outputs move.

        Args:
            moved: By layer, how the outputs of its calls move: functions that return it.
            direct: How direct parameters move.
        """
        if self._passed is None:
            self.pull(torch.zeros_like(self._outputs))
        assert self._passed is not None
        ((met, gradients), transpose), self._passed = self._passed, None
        self._moved.update(moved)
        given = {name: [_given(*pair) for pair in zip(met[name], moved[name], strict=True)] for name in met}
        result: Tensor = transpose((given, {name: direct[name] for name in gradients}), retain_graph=False)[0]
        self._moved.clear()
        return result


def _given(met: Tensor, tangent: Tangent) -> Tensor:
    """Return the gradient to pass back into what :meth:`Pushforward.pull` has met; in eager code hooks give it."""
    return tangent() if torch.compiler.is_compiling() else torch.zeros_like(met)


def _ordered_like(model: Any, tree: Any) -> Any:
    """Return a tree with the keys of its dicts in the order of another's, which ``torch.func`` wants to be the same."""
    if isinstance(model, dict):
        return {key: _ordered_like(part, tree[key]) for key, part in model.items()}
    if isinstance(model, tuple):
        return tuple(_ordered_like(part, of) for part, of in zip(model, tree, strict=True))
    return tree
