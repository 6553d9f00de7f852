"""Blocks: the parameters that share one Q, and how a step's quantities are packed for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._noise import Noise
from ._trees import cast, dense
from ._types import LowRank, Packed, Params
from .capture import Slots
from .layers import LayerSpec, Layout
from .pushforward import Moved, Seen
from .qmodules import QModule

_PROBE_ROWS = 16  # rows that a probe is made of,
_PROBE_SIDE = 128  # in layers with both sides as long as this
_STATISTICS_ROWS = 512  # most rows that a batch adds to the statistics of a layer,
_STATISTICS_EXAMPLES = 32  # and most examples, where each has many rows
_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over the fractions, and never repeat


@dataclass(frozen=True)
class Block:
    """The parameters that share one Q.

    Attributes:
        name: The layer's qualified name, or the parameter's where it is a block of its own.
        family: Name of the Q family.
        shape: Packed shape.
        names: Qualified parameter name by local name.
        spec: How they are packed; ``None`` for parameters without a layout, which are laid end to end.
        dtype: Of all that is packed; that of the parameters may be a lower one.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    names: Mapping[str, str]
    spec: Layout | None
    dtype: torch.dtype

    def pack(self, tensors: Params) -> Tensor:
        """Pack parameters, or directions in them, given by qualified name."""
        local = {name: tensors[q].to(self.dtype) for name, q in self.names.items()}
        if self.spec is None:
            flat = [t.reshape(-1) for t in local.values()]
            return (flat[0] if len(flat) == 1 else torch.cat(flat)).view(self.shape)
        return self.spec.pack(local)

    def times(self, tensors: Params, r: Tensor) -> Tensor:
        """Return what :meth:`pack` gives times a matrix ``r``, of a block that is a hooked layer."""
        assert isinstance(self.spec, LayerSpec)
        return self.spec.times({name: tensors[q] for name, q in self.names.items()}, r)

    def unpack(self, u: Tensor, like: Params) -> Params:
        """Undo :meth:`pack`, but for the dtype; ``like`` gives the parameters' shapes."""
        if self.spec is None:
            pieces = torch.split(u.reshape(-1), [like[q].numel() for q in self.names.values()])
            return {q: piece.view(like[q].shape) for q, piece in zip(self.names.values(), pieces, strict=True)}
        return {self.names[local]: t for local, t in self.spec.unpack(u).items()}

    def target_norm(self) -> float:
        """Return the Frobenius norm of an orthogonal matrix of the packed shape."""
        *groups, m, n = self.shape
        return math.sqrt(math.prod(groups) * min(m, n))


def prefers_rows(shape: tuple[int, ...], rows: int) -> bool:
    """Tell whether a Kronecker Q is applied with fewer FLOPs to factors, which are then multiplied out, than densely.

    The dense matrix itself is needed in both cases, for the momentum.

    Args:
        shape: Packed shape.
        rows: Rows of the factors.

    Returns:
        Whether it is.
    """
    m, n = shape[-2:]
    return rows * (m * m + n * n + m * n) < m * n * (m + n)


def spread(count: int, parts: int, device: torch.device) -> Tensor:
    """Choose rows, one in each of equal parts, at places that follow no period.

    Rows are ordered by example, then by position: at equal distances all might be of the same position.

    Args:
        count: Number of rows there are.
        parts: Number of rows to choose.
        device: Of the result.

    Returns:
        Indices, ascending.
    """
    part = torch.arange(parts, device=device, dtype=torch.float32)
    return ((part + (part * _GOLDEN) % 1) * (count / parts)).long()


def gaussian(like: Tensor, noise: Noise, salt: int) -> Packed:
    r"""Draw a Gaussian probe, :math:`E[uu^\top] = I`, which is all of it that the mean of :math:`A(\lambda)` knows.

    Where both sides are long it is a product of two normal factors: an update costs less, and no large draw is made.

    Args:
        like: Packed matrix of the shape, dtype and device.
        noise: Source of the draw.
        salt: Tells the draws of one source apart.

    Returns:
        The draw, dense or factored.
    """
    if min(like.shape[-2:]) < _PROBE_SIDE:
        return noise.normal(like, salt)
    *groups, m, n = like.shape
    d, a = (noise.fork(i).normal(like.new_empty(*groups, _PROBE_ROWS, side), salt) for i, side in enumerate((m, n)))
    return LowRank(d / math.sqrt(_PROBE_ROWS), a)


def rows_in(block: Block, ds: Sequence[Tensor]) -> int:
    """Return the number of rows of gradients at a layer's output, over its calls."""
    return sum(d.numel() for d in ds) // math.prod(block.shape[:-1])


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows), -2)


class Packing:
    """Turns what one linearization sees and pulls back into packed matrices, and packed directions into tangents.

    The rows of a layer's inputs are made once, so that all products of one step share them.

    Args:
        blocks: All blocks.
        seen: Inputs of the hooked layers, by block name, a list over calls.
        slots: What was probed; a layer in it that was not called, or less often, has no gradient from the rest.
    """

    def __init__(self, blocks: Sequence[Block], seen: Seen, slots: Slots) -> None:
        self.blocks, self.seen, self.slots = blocks, seen, slots
        self._rows: dict[str, Tensor] = {}

    def _spec(self, block: Block) -> LayerSpec:
        assert isinstance(block.spec, LayerSpec)  # what was probed has a hook
        return block.spec

    def _input_rows(self, block: Block, xs: Sequence[Tensor]) -> Tensor:
        return _joined([self._spec(block).input_rows(x) for x in xs]).to(block.dtype)

    def _output_rows(self, block: Block, ds: Sequence[Tensor]) -> Tensor:
        return _joined([self._spec(block).output_rows(d) for d in ds]).to(block.dtype)

    def _packed(self, block: Block, pulled: Any, rows_wanted: bool | None) -> Packed:
        deltas, direct = pulled
        if block.name not in self.slots:
            return block.pack(direct)
        if block.name not in self.seen:
            return self.slots[block.name][0].zeros().new_zeros(block.shape, dtype=block.dtype)
        xs = self.seen[block.name]
        ds = deltas[block.name][: len(xs)]
        if rows_wanted is None:
            rows_wanted = prefers_rows(block.shape, rows_in(block, ds))
        if rows_wanted:
            if block.name not in self._rows:
                self._rows[block.name] = self._input_rows(block, xs)
            return LowRank(self._output_rows(block, ds), self._rows[block.name])
        gradients = [self._spec(block).gradient(x, d).to(block.dtype) for x, d in zip(xs, ds, strict=True)]
        return gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(0)

    def gradients(self, pulled: Any) -> dict[str, Packed]:
        """Pack ``(deltas, direct gradients)``: factored where rows are few, dense elsewhere."""
        return {b.name: self._packed(b, pulled, None) for b in self.blocks}

    def probe(self, pulled: Any, gradients: Mapping[str, Packed], q: Mapping[str, QModule]) -> dict[str, Packed]:
        """Return gradients in which layers with long sides and many rows are estimated from some of the rows.

        The cost of an update of λ grows with the rank of its probe, where Q keeps factors.

        Args:
            pulled: What ``gradients`` were packed from.
            gradients: From :meth:`gradients`.
            q: Q modules.
        """
        return {b.name: self._few_rows(b, pulled, gradients[b.name], q[b.name]) for b in self.blocks}

    def _few_rows(self, block: Block, pulled: Any, gradient: Packed, q: QModule) -> Packed:
        if block.name not in self.seen or not q.keeps_factors or min(block.shape[-2:]) < _PROBE_SIDE:
            return gradient
        xs = self.seen[block.name]
        ds = pulled[0][block.name][: len(xs)]
        count = rows_in(block, ds)
        if count < 2 * _PROBE_ROWS:
            return gradient
        rows = gradient if isinstance(gradient, LowRank) else None
        return self._chosen_rows(block, xs, ds, rows, _PROBE_ROWS, count / _PROBE_ROWS)

    def _chosen_rows(
        self, block: Block, xs: Sequence[Tensor], ds: Sequence[Tensor], rows: LowRank | None, parts: int, factor: float
    ) -> LowRank:
        """Return some of the rows, see :func:`spread`, with the left factor multiplied by ``factor``.

        Args:
            block: A hooked layer.
            xs: What was kept of its calls.
            ds: Gradients at their outputs.
            rows: All rows, where they are there already.
            parts: How many to choose.
            factor: The multiple.
        """
        spec, chosen = self._spec(block), spread(rows_in(block, ds), parts, ds[0].device)
        if rows is None and len(xs) == 1:
            some = spec.rows_at(xs[0], ds[0], chosen)
        else:
            d, a = rows or (self._output_rows(block, ds), self._input_rows(block, xs))
            some = LowRank(d[..., chosen, :], a[..., chosen, :])
        return LowRank(some.d.to(block.dtype) * factor, some.a.to(block.dtype))

    def statistics(self, pulled: Any, q: Mapping[str, QModule]) -> dict[str, Packed]:
        """Pack a random gradient for the Q modules that have a basis: as rows, some if many, for those that take rows.

        Args:
            pulled: The random gradient. Only sums over rows are taken of it: some rows, scaled, have the same mean.
            q: Q modules.

        Returns:
            By block.
        """
        based = [b for b in self.blocks if q[b.name].has_basis]
        rows = {b.name for b in based if b.name in self.seen and q[b.name].takes_rows}
        return {b.name: self._some_rows(b, pulled) if b.name in rows else self._packed(b, pulled, False) for b in based}

    def _some_rows(self, block: Block, pulled: Any) -> LowRank:
        spec, xs = self._spec(block), self.seen[block.name]
        ds = pulled[0][block.name][: len(xs)]
        if all(spec.has_positions(x) and len(x) > _STATISTICS_EXAMPLES for x in xs):
            scale = [math.sqrt(len(x) / _STATISTICS_EXAMPLES) for x in xs]
            chosen = [spread(len(x), _STATISTICS_EXAMPLES, x.device) for x in xs]
            ds = [d[i] * factor for d, i, factor in zip(ds, chosen, scale, strict=True)]
            xs = [x[i] for x, i in zip(xs, chosen, strict=True)]
            a = None
        else:
            a = self._rows.get(block.name)
        count = rows_in(block, ds)
        if count <= _STATISTICS_ROWS:
            return LowRank(self._output_rows(block, ds), self._input_rows(block, xs) if a is None else a)
        rows = None if a is None else LowRank(self._output_rows(block, ds), a)
        return self._chosen_rows(block, xs, ds, rows, _STATISTICS_ROWS, math.sqrt(count / _STATISTICS_ROWS))

    def tangents(self, v: Mapping[str, Packed], params: Params) -> tuple[Moved, Params]:
        """Return how layer outputs and direct parameters move when the packed parameters move by ``v``.

        Args:
            v: Packed directions.
            params: Give shapes and dtypes.

        Returns:
            Functions that return the tangents of the outputs of each layer's calls, and the tangents of parameters.
        """
        moved: Moved = {}
        direct: Params = {}
        for b in self.blocks:
            if b.name in self.slots:
                slots, xs, spec = self.slots[b.name], self.seen.get(b.name, []), self._spec(b)
                calls = [partial(spec.tangent, x, cast(v[b.name], s.dtype)) for x, s in zip(xs, slots, strict=False)]
                moved[b.name] = calls + [slot.zeros for slot in slots[len(calls) :]]
            else:
                direct |= {k: t.to(params[k].dtype) for k, t in b.unpack(dense(v[b.name]), params).items()}
        return moved, direct
