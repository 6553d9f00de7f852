"""From a direction to new parameters: how long each block's step is, and the write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._opaque import readable
from ._trees import assign_, descend_, inverse_or_zero, total
from ._types import Groups, Hyper, Packed
from .batch import Runner
from .momentum import Direction, Momentum


class Descent:
    """Steps along directions.

    Args:
        runner: Has the parameters.
        groups: Hyperparameters.
        averages: What directions are made of.
        step_norm: What gives a step its length, see ``fishlegify``.

    Attributes:
        lengths: Of the last step: η, s(p) / p and ‖p‖, ``[3, blocks]``; NaN before the first.
    """

    def __init__(self, runner: Runner, groups: Groups, averages: Momentum, step_norm: str | None) -> None:
        self._runner, self._groups, self._averages, self._step_norm = runner, groups, averages, step_norm
        blocks, like = runner.plan.blocks, groups.hypers[0].lr
        self._names = [block.name for block in blocks]
        self._targets = like.new_tensor([block.target_norm() for block in blocks])
        self.lengths = like.new_full((3, len(blocks)), torch.nan)

    def take(self, direction: Direction, g: Mapping[str, Packed], ok: Tensor | None) -> None:
        """Take a step.

        Args:
            direction: Of the blocks that move.
            g: The gradient that it was made of.
            ok: In compiled code, whether to change anything.
        """
        scales = self._scales(direction, g)
        self._move(direction.p, scales, ok)
        self._note(direction, scales, ok)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return what stays in place from step to step."""
        return self.lengths, self._targets

    def _scales(self, direction: Direction, g: Mapping[str, Packed]) -> Tensor:
        """Return s(p) / p of the blocks that move, in the order of their norms: ``[moving]``."""
        p, norms = direction
        if self._step_norm == "layer":
            moving = list(p)
            some = moving != self._names
            targets = torch.stack([self._targets[self._names.index(k)] for k in moving]) if some else self._targets
            return targets * inverse_or_zero(norms)
        factor = torch.ones_like(self._groups.hypers[0].lr)
        if self._step_norm == "kl":
            hyper = self._groups.hypers[0]
            lr = {k: self._groups.hypers[self._groups.of_block[k]].lr for k in p}
            predicted = total(lr[k].square() * x for k, x in self._averages.predicted(g, p).items())
            bound = (hyper.kl_clip * inverse_or_zero(predicted)).sqrt()
            factor = torch.where(predicted <= hyper.kl_clip, factor, bound)  # zero if it overflows
        return factor.expand(len(p))

    def _move(self, p: Mapping[str, Tensor], scales: Tensor, ok: Tensor | None) -> None:
        """Write the parameters of the blocks that move: θ ← θ − η s(p) − η wd θ."""
        params, groups = self._runner.params(), self._groups
        keeps = [_keep(hyper) for hyper in groups.hypers]
        rates = [dict(zip(p, (hyper.lr * scales).unbind(), strict=True)) for hyper in groups.hypers]
        for block in self._runner.plan.blocks:
            if block.name in p:
                for name, direction in block.unpack(p[block.name], params).items():
                    group = groups.of_parameter[name]
                    descend_(params[name], keeps[group], direction, rates[group][block.name], ok)

    def _note(self, direction: Direction, scales: Tensor, ok: Tensor | None) -> None:
        """Keep the lengths of a step; blocks without a gradient have taken none."""
        p, norms = direction
        rates = torch.stack([self._groups.hypers[self._groups.of_block[k]].lr for k in p])
        found = torch.stack((rates, scales, norms))
        if list(p) != self._names:
            columns = dict(zip(p, found.unbind(-1), strict=True))
            none = torch.zeros_like(found[:, 0])
            found = torch.stack([columns.get(k, none) for k in self._names], -1)
        assign_(self.lengths, found, ok)


def _keep(hyper: Hyper) -> Tensor | None:
    """Return what weight decay leaves of a parameter, 0-d; ``None`` where that is known to be all."""
    keep = 1 - hyper.lr * hyper.weight_decay
    return None if readable(keep) and keep == 1 else keep
