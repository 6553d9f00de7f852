"""Checkpoints of the original implementation: the model's own entries, and what its Q learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .kronecker import ScaledKronecker
from .qmodules import QModule
from .transform import ROOT

__all__ = ["load_original_checkpoint"]

_MARK = "fishleg_aux."
_SMALLEST, _LARGEST = 1e-13, 1e13  # scales that e^s reaches


def load_original_checkpoint(q: Mapping[str, QModule], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Load what Q learned in the original implementation, and return the model's own entries.

    The original keeps λ in the model, as entries ``layer.fishleg_aux.NAME``. All of its layers but BERT's attention
    are, in our packing,

    .. math:: Q u = A \odot (R^\top R (A \odot U) L L^\top)

    the family ``scaled_kronecker``: linear layers with the same L, R and A; convolutions with their L transposed;
    embeddings with A times their R, a vector; norms with :math:`A = |L_w|` and :math:`|L_b|`, and no L and R.

    Args:
        q: Q modules by block, of the family ``scaled_kronecker``: ``step.q`` of a step that was made with
            ``q={"*": "scaled_kronecker"}``; or some of them, with the entries of the same layers.
        state_dict: The original model's ``state_dict()``.

    Returns:
        The entries that are not λ, for ``model.load_state_dict``.

    Raises:
        ValueError: If an entry is unknown or has no block, or a block has no entry, or is of another family or shape,
            or if a scale cannot be written as :math:`e^s`; all are named, and nothing is changed.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> step = ff.fishlegify(model, q={"*": "scaled_kronecker"})
        >>> aux = {"L": torch.eye(2), "R": torch.eye(1), "A": torch.full((1, 2), 3.0)}
        >>> saved = {"weight": torch.ones(1, 2)} | {f"fishleg_aux.{name}": x for name, x in aux.items()}
        >>> model.load_state_dict(load_original_checkpoint(step.q, saved))
        <All keys matched successfully>
        >>> [round(x, 4) for x in step.q["(root)"].diagonal().flatten().tolist()]  # the square of A
        [9.0, 9.0]
    """
    own = {name: x for name, x in state_dict.items() if _MARK not in name}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, x in state_dict.items():
        if _MARK in name:
            layer, _, local = name.rpartition(_MARK)
            groups.setdefault(layer.rstrip("."), {})[local] = x
    if not groups:
        raise ValueError("the state has no entries 'fishleg_aux.*', and must have some; load it with load_state_dict")
    problems: list[str] = []
    moves: list[tuple[QModule, dict[str, Tensor]]] = []
    seen: set[str] = set()
    for layer, aux in groups.items():
        try:
            forms = _forms(layer, aux, own)
        except _Unmapped as reason:
            problems.append(f"{layer or ROOT}: {reason}")
            continue
        seen |= forms.keys()
        for block, form in forms.items():
            misfit = _misfit(form, q.get(block))
            if misfit:
                problems.append(f"{block}: {misfit}")
            else:
                moves.append((q[block], _values(form, q[block])))
    problems += [f"{block}: has no entries {_MARK}* in the checkpoint" for block in q if block not in seen]
    if problems:
        raise ValueError(
            f"the checkpoint must fit the Q modules, block by block, and nothing was changed: {'; '.join(problems)}. "
            "To load only the model, take {k: x for k, x in state.items() if 'fishleg_aux' not in k}; to load Q for "
            "some layers, give both arguments with those only"
        )
    with torch.no_grad():
        for module, values in moves:
            for name, value in values.items():
                getattr(module, name).copy_(value)
    return own


class _Form(NamedTuple):
    """What one block has in the original: A ⊙ (RᵀR (A ⊙ U) L Lᵀ), ``None`` standing for the identity."""

    scale: Tensor
    left: Tensor | None = None
    right: Tensor | None = None


class _Unmapped(Exception):
    """A layer's λ has no counterpart."""


def _forms(layer: str, aux: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, _Form]:
    """Return the forms of the blocks of one layer, by the names that our blocks have."""
    prefix = f"{layer}." if layer else ""
    if aux.keys() == {"L_w", "L_b"}:  # a norm; the original keeps L_b also for one without a bias
        if f"{prefix}bias" in own:
            return {layer or ROOT: _Form(torch.stack((aux["L_w"].abs(), aux["L_b"].abs()), -1))}
        return {f"{prefix}weight": _Form(aux["L_w"].abs())}
    if aux.keys() >= {"K", "Q", "V", "O"}:
        raise _Unmapped(
            "attention of BERT, where one Q couples keys with queries and values with the output: no family does that, "
            "and it must be learned anew"
        )
    if aux.keys() != {"L", "R", "A"}:
        raise _Unmapped(f"the entries {sorted(aux)} are those of no layer of the original")
    if f"{prefix}weight" not in own:
        raise _Unmapped(f"without an entry {prefix}weight, which says what layer it is")
    if aux["R"].ndim == 1:  # an embedding: R acts on rows as A does, and its sign cancels
        return {f"{prefix}weight": _Form(aux["A"] * aux["R"].abs().unsqueeze(-1), aux["L"])}
    left = aux["L"].mT if own[f"{prefix}weight"].ndim > 2 else aux["L"]  # of a convolution, or a linear layer
    return {layer or ROOT: _Form(aux["A"], left, aux["R"])}


def _misfit(form: _Form, module: QModule | None) -> str:
    """Say why a form cannot be written into a Q module; empty if it can."""
    if module is None:
        return "has entries in the checkpoint, and no Q module"
    if not isinstance(module, ScaledKronecker):
        return f"is of the family {type(module).__name__}, and must be of 'scaled_kronecker'"
    vector = form.left is None and form.scale.numel() == math.prod(module.shape)
    given = {"A": form.scale.shape, "L": getattr(form.left, "shape", None), "R": getattr(form.right, "shape", None)}
    ours = {"A": form.scale.shape if vector else torch.Size(module.shape), "L": module.L.shape, "R": module.R.shape}
    wrong = [
        f"{k} is {tuple(x)} instead of {tuple(ours[k])}" for k, x in given.items() if x is not None and x != ours[k]
    ]
    if wrong:
        return f"{', '.join(wrong)} (groups have one Q each here, and sides longer than max_dim are split)"
    if not bool(((form.scale >= _SMALLEST) & (form.scale <= _LARGEST)).all()):
        low, high = form.scale.min().item(), form.scale.max().item()
        return f"scales in [{low:g}, {high:g}] must be in [{_SMALLEST:g}, {_LARGEST:g}], since they are e^s here"
    return ""


def _values(form: _Form, module: QModule) -> dict[str, Tensor]:
    """Return λ that makes Q of the module the form."""
    values = {"s": form.scale.double().log().view(module.shape)}
    for name, given in (("L", form.left), ("R", form.right)):
        kept = getattr(module, name)
        values[name] = torch.eye(kept.shape[-1]).expand(kept.shape) if given is None else given
    return values
