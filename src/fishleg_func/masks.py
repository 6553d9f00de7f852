"""Masks that hold removed weights at zero, by ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from . import _checks
from .transform import unwrapped


def attach(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Hold removed weights at zero through further training, by ``torch.nn.utils.prune``.

    Each module then has ``weight_orig`` and ``weight_mask`` in place of ``weight``; the Parameter is the same object,
    so that optimizers go on.

    Args:
        model: The model.
        masks: By parameter name, from :func:`prune`.

    Raises:
        ValueError: If a mask is not one of a parameter; nothing is changed.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(2, 1)
        >>> ff.pruning.attach(model, {"weight": torch.tensor([[True, False]])})
        >>> model.weight[0, 1].item() == 0, torch.nn.utils.prune.is_pruned(model)
        (True, True)
        >>> ff.pruning.detach(model, ["weight"])
        >>> torch.nn.utils.prune.is_pruned(model)
        False
    """
    model = unwrapped(model)
    _checks.masks(masks, {name: p.shape for name, p in model.named_parameters()})
    for name, mask in masks.items():
        path, _, local = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), local, mask)  # type: ignore[no-untyped-call]


def detach(model: nn.Module, names: Iterable[str]) -> None:
    """Undo :func:`attach`: the weights become plain parameters again, with zeros where they are removed.

    Args:
        model: The model.
        names: Of the parameters, such as masks by name.
    """
    model = unwrapped(model)
    for name in names:
        path, _, local = name.rpartition(".")
        torch_prune.remove(model.get_submodule(path), local)  # type: ignore[no-untyped-call]
