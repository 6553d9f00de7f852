"""From a model to a plan: which parameters share a Q, of which family, and which are left alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .blocks import Block
from .capture import Keep
from .families import FAMILIES
from .layers import LayerSpec
from .packed import find_layouts, is_table, table_shape
from .qmodules import QModule
from .registry import find_spec
from .spiked import Spiked

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ROOT = "(root)"
"""Name of the block of a model that is itself a layer."""

JOINT = "joint"
"""The family of one dense matrix over all parameters together, and the name of its block."""

Family = str | Callable[..., QModule]


@dataclass(frozen=True)
class Plan:
    """What will be trained, and how.

    Attributes:
        blocks: Every trained parameter is in one of them.
        layers: The modules to hook, by block name.
        q: A new Q module for each block, by name.
        left_alone: Parameters that are not trained, with the reason.
    """

    blocks: tuple[Block, ...]
    layers: Mapping[str, nn.Module]
    q: Mapping[str, QModule]
    left_alone: Mapping[str, str]

    def keep(self) -> dict[str, Keep]:
        """Return what is kept of a call of each hooked layer, by block name."""
        return {b.name: b.spec.keep for b in self.blocks if isinstance(b.spec, LayerSpec)}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside one that ``torch.compile`` wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def ancestry(name: str) -> list[str]:
    """Return a qualified name and those of the modules it is in: ``a.b.weight``, ``a.b``, ``a``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _as_list(patterns: str | Sequence[str] | None) -> list[str]:
    listed = [] if patterns is None else [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, Sequence) or not all(isinstance(p, str) for p in listed):
        raise TypeError(f"patterns {patterns!r} must be a glob or a list of globs, such as 'encoder.*'")
    return list(listed)


def select(
    model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Return the parameters to train, by name, and those left alone with the reason.

    Args:
        model: The model.
        include: Globs on parameter or module names; only what they match is trained.
        exclude: Globs; what they match is not trained.

    Raises:
        ValueError: If there is nothing to train, or a pattern matches nothing.
    """
    params = dict(model.named_parameters())
    if not params:
        raise ValueError(
            f"the model {type(model).__name__} has no parameters, and must have some; pass the module to train"
        )
    every_name = {a for name in params for a in ancestry(name)}
    wanted, unwanted = _as_list(include), _as_list(exclude)
    _checks.all_patterns_match("include", wanted, every_name)
    _checks.all_patterns_match("exclude", unwanted, every_name)
    left_alone: dict[str, str] = {}
    for name, p in params.items():
        names = ancestry(name)
        if not p.requires_grad:
            left_alone[name] = "frozen"
        elif include is not None and not any(_checks.matches(w, names) for w in wanted):
            left_alone[name] = "not included"
        elif any(_checks.matches(w, names) for w in unwanted):
            left_alone[name] = "excluded"
        elif isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} of a lazy module must be initialized: run the model on a batch first")
        elif p.dtype not in _DTYPES:
            raise ValueError(
                f"parameter {name!r} of dtype {p.dtype} must be float32, float64, bfloat16 or float16: convert it, or "
                f"leave it alone with exclude={name!r}"
            )
    chosen = {name: p for name, p in params.items() if name not in left_alone}
    if not chosen:
        raise ValueError(f"no parameter is left to train and at least one must be; left alone: {left_alone}")
    return chosen, left_alone


def _widest(chosen: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of all that is packed: float32, or wider where a parameter is."""
    return functools.reduce(torch.promote_types, {p.dtype for p in chosen.values()}, torch.float32)


def _blocks(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> tuple[list[Block], dict[str, nn.Module]]:
    """Return a block for every parameter, and the modules to hook by block name.

    Parameters that several modules own are left out of what a module packs together, and stand alone.
    """
    dtype = _widest(chosen)
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    tables = {p for m in model.modules() if is_table(m) for p in m.parameters(recurse=False)}
    blocks: list[Block] = []
    hooked: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {n: p for n, p in module.named_parameters(recurse=False) if owners[p] == 1 and prefix + n in chosen}
        spec = find_spec(module, tuple(own)) if own else None
        if spec is not None:
            hooked[path or ROOT] = module
        for layout in [spec] if spec else find_layouts(module, own):
            whole = layout is spec or layout.names[0] == "weight"
            name = (path or ROOT) if whole else prefix + layout.names[0]
            names = {n: prefix + n for n in (own if layout is spec else layout.names)}
            blocks.append(Block(name, layout.family, layout.shape, names, layout, dtype))
    covered = {name for block in blocks for name in block.names.values()}
    for name, p in chosen.items():
        if name not in covered:
            shape = table_shape(p)
            family = "embedding" if p in tables else "kfac" if min(shape) > 1 else "diagonal"
            blocks.append(Block(name, family, shape, {name.rpartition(".")[2]: name}, None, dtype))
    return blocks, hooked


def make_plan(
    model: nn.Module,
    q: Family | Mapping[str, Family],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> Plan:
    """Decide on every parameter of a model.

    Args:
        model: The model; only looked at.
        q: A family for all that has ``"kfac"`` by default, or families by glob pattern, the first that matches a
            block or its parameters; or ``"joint"``.
        include: Globs of what to train.
        exclude: Globs of what not to train.

    Returns:
        The plan.

    Raises:
        ValueError: If a pattern matches nothing, a family is unknown, or nothing is left to train.
        TypeError: If a callable family does not make Q modules.
    """
    chosen, left_alone = select(model, include, exclude)
    if q == JOINT:
        return _joint_plan(chosen, left_alone)
    trained = set(chosen.values())
    _checks.plain_tables(
        {path: m for path, m in model.named_modules() if is_table(m) and trained & set(m.parameters(recurse=False))}
    )
    blocks, hooked = _blocks(model, chosen)
    families = _families(q, blocks)
    modules = {}
    for i, block in enumerate(blocks):
        label, factory = families[block.name]
        device = chosen[next(iter(block.names.values()))].device
        modules[block.name] = factory(block.shape, dtype=block.dtype, device=device)
        if not isinstance(modules[block.name], QModule):
            raise TypeError(
                f"q for {block.name!r} made a {type(modules[block.name]).__name__}, and must make a QModule"
            )
        blocks[i] = replace(block, family=label)
    return Plan(tuple(blocks), hooked, modules, left_alone)


def _joint_plan(chosen: Mapping[str, nn.Parameter], left_alone: Mapping[str, str]) -> Plan:
    """Return the plan of one dense Q over all parameters, which knows how layers depend on each other."""
    block, device = joint_block(chosen), next(iter(chosen.values())).device
    return Plan((block,), {}, {JOINT: FAMILIES["dense"](block.shape, dtype=block.dtype, device=device)}, left_alone)


def joint_block(params: Mapping[str, Tensor]) -> Block:
    """Return the block of all parameters together, laid end to end in the order that they come in."""
    shape = (1, sum(p.numel() for p in params.values()))
    return Block(JOINT, JOINT, shape, {name: name for name in params}, None, _widest(params))


def low_rank(params: Mapping[str, Tensor], rank: int) -> tuple[Block, Spiked]:
    """Return the block of all parameters together, and the identity as a Q of a rank for it.

    Raises:
        ValueError: If the rank is none.
    """
    block, device = joint_block(params), next(iter(params.values())).device
    _checks.integer("rank", rank, 1, "use about 200")
    if rank > block.shape[1]:
        raise ValueError(f"rank={rank} must be <= {block.shape[1]}, the number of parameters; use {block.shape[1]}")
    return block, Spiked(block.shape, rank=rank, dtype=block.dtype, device=device)


def _families(
    q: Family | Mapping[str, Family], blocks: Sequence[Block]
) -> dict[str, tuple[str, Callable[..., QModule]]]:
    """Return each block's family, as a name to report and a factory."""
    if isinstance(q, Mapping):
        names = {b.name: [*ancestry(b.name), *(a for n in b.names.values() for a in ancestry(n))] for b in blocks}
        _checks.all_patterns_match("q", q, {n for group in names.values() for n in group})
    chosen: dict[str, tuple[str, Callable[..., QModule]]] = {}
    for block in blocks:
        family: Any = block.family
        if isinstance(q, Mapping):
            family = next((f for pattern, f in q.items() if _checks.matches(pattern, names[block.name])), family)
        elif family == "kfac":
            family = q
        if isinstance(family, str):
            _checks.choice("q", family, FAMILIES if isinstance(q, Mapping) else (*FAMILIES, JOINT))
            chosen[block.name] = (family, FAMILIES[family])
        elif callable(family):
            chosen[block.name] = (getattr(family, "__name__", repr(family)), family)
        else:
            raise ValueError(
                f"q={family!r} must be a family name ({', '.join(FAMILIES)}) or a callable shape -> QModule"
            )
    return chosen
