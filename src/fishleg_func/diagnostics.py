"""What users are told: the report of every parameter, the accuracy of Q, and log lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._types import Accuracy
from .likelihoods import Likelihood
from .transform import Plan

logger = logging.getLogger("fishleg_func")


@dataclass(frozen=True)
class Row:
    """What is done with one parameter.

    Attributes:
        parameter: Qualified name.
        shape: Its shape.
        block: The block it is in; empty where it is left alone.
        treatment: The Q family, or why the parameter is left alone.
        capture: ``"rows"`` where hooks see the layer, ``"autograd"`` where the gradient is taken as it is.
        packed: Packed shape of the block.
        state_bytes: Bytes of all state of the block, counted at its first parameter.
        flops: Share of the floating-point operations of applying Q, counted at its first parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str
    treatment: str
    capture: str
    packed: tuple[int, ...]
    state_bytes: int
    flops: float


@dataclass(frozen=True)
class Report:
    """What is done with every parameter of a model; ``print`` it.

    Attributes:
        rows: One for each parameter.
        likelihood: As the step uses it.
    """

    rows: tuple[Row, ...]
    likelihood: str

    def __str__(self) -> str:
        """Return a table."""
        head = ("parameter", "shape", "treatment", "capture", "packed", "state", "FLOPs")
        cells = [head]
        for r in self.rows:
            counted = (f"{r.state_bytes / 1024:,.1f} KiB", f"{100 * r.flops:.1f} %") if r.state_bytes else ("", "")
            packed = "x".join(map(str, r.packed))
            cells.append(
                (r.parameter, "x".join(map(str, r.shape)) or "scalar", r.treatment, r.capture, packed, *counted)
            )
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        total = sum(r.state_bytes for r in self.rows)
        return "\n".join([*lines, f"likelihood: {self.likelihood}; state: {total / 1024:,.1f} KiB"])


def report(
    model: nn.Module,
    plan: Plan,
    unhooked: frozenset[str] | set[str],
    state: Mapping[str, Sequence[Tensor]],
    likelihood: Likelihood | None,
) -> Report:
    """Build the report.

    Args:
        model: The model.
        plan: What was planned for it.
        unhooked: Layers whose hook was found not to tell their gradient.
        state: All tensors kept for each block.
        likelihood: The likelihood, or ``None`` before it is resolved.

    Returns:
        The report.
    """
    block_of = {name: block for block in plan.blocks for name in block.names.values()}
    flops = {block.name: plan.q[block.name].flops() for block in plan.blocks}
    counted: set[str] = set()
    rows = []
    for name, p in model.named_parameters():
        block = block_of.get(name)
        if block is None:
            rows.append(Row(name, tuple(p.shape), "", plan.left_alone[name], "", (), 0, 0.0))
            continue
        first = block.name not in counted
        counted.add(block.name)
        size = sum(t.numel() * t.element_size() for t in state[block.name]) if first else 0
        share = flops[block.name] / sum(flops.values()) if first else 0.0
        capture = "rows" if block.name in plan.layers and block.name not in unhooked else "autograd"
        rows.append(Row(name, tuple(p.shape), block.name, block.family, capture, block.shape, size, share))
    return Report(tuple(rows), "resolved from the first targets" if likelihood is None else repr(likelihood))


def accuracy(
    residual: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], probes: Sequence[Mapping[str, Tensor]]
) -> Accuracy:
    """Average relative residuals over probes.

    Args:
        residual: From a probe u to (F + γI)Qu − u, by block.
        probes: Directions u, by block.

    Returns:
        The averages.
    """
    overall, layers = [], dict[str, list[Tensor]]()
    for u in probes:
        r = residual(u)
        squares = {k: (r[k].square().sum(), u[k].square().sum()) for k in u}
        overall.append((sum(a for a, _ in squares.values()) / sum(b for _, b in squares.values())) ** 0.5)
        for k, (a, b) in squares.items():
            layers.setdefault(k, []).append((a / b).sqrt())
    mean = {k: float(torch.stack(v).mean()) for k, v in layers.items()}
    return Accuracy(float(torch.stack(overall).mean()), mean)


def flat(columns: Mapping[str, Tensor], blocks: Sequence[str], measured: Accuracy | None) -> dict[str, float]:
    """Return measurements by name for a logger, with one transfer from the device.

    Args:
        columns: Overall value, then one for each block, by name.
        blocks: Their names.
        measured: The accuracy of Q, where it was measured.
    """
    keys = [f"fishleg/{name}{of}" for name in columns for of in ("", *(f"/{b}" for b in blocks))]
    found = dict(zip(keys, torch.cat(list(columns.values())).tolist(), strict=True))
    if measured is not None:
        found["fishleg/accuracy"] = measured.overall
        found |= {f"fishleg/accuracy/{b}": measured.layers[b] for b in blocks}
    return found


def log_resolved(likelihood: Likelihood) -> None:
    """Say which likelihood was chosen."""
    logger.info("likelihood resolved from the first targets: %r", likelihood)
