"""Watching layers in a training loop: the factors of the gradients that its backward passes leave in the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._types import LowRank, Params
from .blocks import Block, prefers_rows
from .capture import inert_hook, is_own_run
from .layers import LayerSpec

_PROBES = 4  # random vectors that must agree: a difference that is orthogonal to one of them is seen by another
_ROUNDINGS = 8.0  # units of rounding by which the two sums may differ, as a part of the sum of the terms' sizes,
_LARGEST = 1e-3  # which must be small beside the gradient


def is_training_pass() -> bool:
    """Tell whether a call of a module is one of the training loop, of which a backward pass may follow."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    return torch.is_grad_enabled() and not is_own_run() and not _in_a_transform()


def is_batched(gradient: Tensor) -> bool:
    """Tell whether a gradient is of a batched backward pass, as for Jacobians: it leaves none in parameters."""
    return _in_a_transform() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def _in_a_transform() -> bool:
    """Tell whether torch.func is at work, whose tensors end with it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class LayerWatch:
    """The hooks on layers whose gradients are worth having in factors: what goes in, and what gradient comes back.

    A gradient in ``p.grad`` is the truth: factors are used where their product is that gradient, up to a factor (from
    clipping, or from a scaled loss). The two are compared along random vectors, in a few passes over the gradient.

    Args:
        blocks: All blocks.
        layers: The modules to hook, by block name.
    """

    def __init__(self, blocks: Sequence[Block], layers: Mapping[str, nn.Module]) -> None:
        hooked = [block for block in blocks if block.name in layers and isinstance(block.spec, LayerSpec)]
        self._layers = [_Layer(block) for block in hooked]
        self._handles = [
            layers[layer.block.name].register_forward_hook(layer, with_kwargs=True) for layer in self._layers
        ]

    def factors(self, gradients: Params) -> dict[str, LowRank]:
        """Return the gradients that were left in parameters in factors, by block, where that is known and cheaper.

        Args:
            gradients: By parameter name.

        Returns:
            Of some blocks.
        """
        found = [(layer, rows) for layer in self._layers if (rows := layer.rows(gradients)) is not None]
        if not found:
            return {}
        numbers = torch.stack([layer.compare(rows, gradients) for layer, rows in found]).tolist()  # waits once
        agreed = {}
        for (layer, rows), (size, difference, scaled, factor, bound) in zip(found, numbers, strict=True):
            info = torch.finfo(rows.a.dtype)
            if not info.tiny**0.5 < bound < info.eps * info.max**0.5:  # squares would leave the range of numbers
                continue
            if difference <= bound <= _LARGEST * size:
                agreed[layer.block.name] = rows
            elif scaled <= abs(factor) * bound <= _LARGEST * size:
                agreed[layer.block.name] = LowRank(rows.d * factor, rows.a)
        return agreed

    def forget(self) -> None:
        """Drop what backward passes have brought."""
        for layer in self._layers:
            layer.forget()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.forget()


class _Call:
    """One call of a layer.

    Args:
        x: What is kept of its input.
        layer: Is told once a backward pass has come by.

    Attributes:
        delta: Gradient at the output, the sum over backward passes.
    """

    def __init__(self, x: Tensor, layer: _Layer) -> None:
        self.x, self._layer = x, layer
        self.delta: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        """Note the gradient at the output."""
        if is_batched(gradient):
            return
        if self.delta is not None:
            self.delta = self.delta + gradient.detach()
        elif self._layer.reaches(self, gradient.numel()):
            self.delta = gradient.detach()


class _Layer:
    """A layer's forward hook, inert in copies of the model.

    Args:
        block: The layer's block.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._r: Tensor | None = None  # random vectors, the same at every step
        self._reached: list[_Call] = []  # others live as long as their graph
        self._size = 0  # of all outputs that were reached

    @property
    def _spec(self) -> LayerSpec:
        assert isinstance(self.block.spec, LayerSpec)
        return self.block.spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Keep the input, until the graph ends or a backward pass has been followed by a step."""
        if not is_training_pass() or not isinstance(out, Tensor) or not out.requires_grad or _saves_elsewhere():
            return
        if not self._worth(self._size + out.numel()):
            return
        x = self._spec.keep(args, kwargs, out)
        if x.dtype == out.dtype == self.block.dtype:  # the rounding of autocast would hide much
            out.register_hook(_Call(x.detach(), self).take)  # type: ignore[no-untyped-call]

    def reaches(self, call: _Call, size: int) -> bool:
        """Take up a call that a backward pass has reached; where that makes too many rows, let go of all."""
        self._size += size
        if not self._worth(self._size):
            self._reached.clear()
            return False
        self._reached.append(call)
        return True

    def _worth(self, size: int) -> bool:
        return prefers_rows(self.block.shape, size // math.prod(self.block.shape[:-1]))

    def rows(self, gradients: Params) -> LowRank | None:
        """Return the rows over all calls, or ``None`` where there are none (or too many), or no gradient was left."""
        calls, names = [(c.x, c.delta) for c in self._reached if c.delta is not None], self.block.names.values()
        if not calls or any(n not in gradients or gradients[n].dtype != self.block.dtype for n in names):
            return None
        d = torch.cat([self._spec.output_rows(d) for _, d in calls], -2)
        a = torch.cat([self._spec.input_rows(x) for x, _ in calls], -2)
        return LowRank(d, a) if d.dtype == self.block.dtype and d.shape[:-1] == a.shape[:-1] else None

    def compare(self, rows: LowRank, gradients: Params) -> Tensor:
        """Compare a gradient with the product of its factors along random vectors.

        Returns:
            Shape ``[5]``: the norm of the gradient; that of the difference; the same after a factor before the
            product; that factor; and the norm that rounding may give the difference.
        """
        if self._r is None or self._r.device != rows.a.device:
            generator = torch.Generator().manual_seed(0)
            self._r = torch.randn(self.block.shape[-1], _PROBES, generator=generator).to(rows.a)
        left = self.block.times(gradients, self._r)
        seen = rows.d.mT @ (rows.a @ self._r)
        factor = (left * seen).sum() / seen.square().sum()
        sizes = (torch.linalg.vector_norm(rows.d, dim=-1) * torch.linalg.vector_norm(rows.a, dim=-1)).sum()
        bound = _ROUNDINGS * torch.finfo(rows.a.dtype).eps * math.sqrt(_PROBES) * sizes
        norm = torch.linalg.vector_norm
        return torch.stack((norm(left), norm(left - seen), norm(left - factor * seen), factor, bound))

    def forget(self) -> None:
        """Drop the calls that a backward pass has reached."""
        for call in self._reached:
            call.delta = None  # a graph that is kept may bring another gradient
        self._reached.clear()
        self._size = 0

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """Become an inert hook in a copy."""
        return inert_hook, ()


def _saves_elsewhere() -> bool:
    """Tell whether what autograd saves is recomputed or moved away, so that to keep it here would be to keep it all."""
    recomputed = torch._C._current_graph_task_id() != -1  # in a backward pass: a reentrant checkpoint
    return recomputed or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
