"""Kernels that can be differentiated: without gradients, or once, torch takes others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def differentiable_kernels(model: nn.Module, *, twice: bool) -> Iterator[None]:
    """Choose kernels that can be differentiated: without gradients, torch takes others for attention and LSTM.

    Args:
        model: What will be run.
        twice: Whether second derivatives are needed too.
    """
    math = sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext()
    bags = twice and any(isinstance(m, nn.EmbeddingBag) for m in model.modules())
    with _without_fast_paths(model), math, _Bags() if bags else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Switch off the fast paths of attention and LSTM: global flags, which compiled code leaves as they are."""
    if torch.compiler.is_compiling():
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(m, nn.LSTM) for m in model.modules()):
            set_flags: Any = torch.backends.mkldnn.set_flags
            enabled = set_flags(_enabled=False, _fp32_precision=None)[0]
            stack.callback(set_flags, _enabled=enabled, _fp32_precision=None)
        yield


class _Bags(TorchFunctionMode):
    """Makes ``F.embedding_bag``, which has one derivative only, of operations that have two."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (embedding_bag if func is F.embedding_bag else func)(*args, **(kwargs or {}))


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Do what ``F.embedding_bag`` does, whose arguments these are; those that change the weight or its gradient, not.

    Returns:
        One row for each bag.
    """
    if offsets is None:
        bags = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        count = len(input)
    else:
        offsets = offsets[:-1] if include_last_offset else offsets
        bags = torch.searchsorted(offsets, torch.arange(len(input), device=input.device), right=True) - 1
        count = len(offsets)
    indices = input.reshape(-1)
    rows = F.embedding(indices, weight)
    share = torch.ones_like(rows[:, :1])
    if padding_idx is not None:
        share = (indices != padding_idx).to(rows.dtype).unsqueeze(-1)
    if mode == "max":
        share = _largest(rows.detach(), share, bags, count)
    if mode == "mean":
        share = share / _total(share, bags, count).clamp(min=1)[bags]
    if per_sample_weights is not None:
        share = share * per_sample_weights.reshape(-1, 1)
    return _total(rows * share, bags, count)


def _total(x: Tensor, bags: Tensor, count: int) -> Tensor:
    """Sum rows over each bag."""
    return x.new_zeros(count, x.shape[1]).index_add(0, bags, x)


def _largest(rows: Tensor, share: Tensor, bags: Tensor, count: int) -> Tensor:
    """Return, for each entry, whether it is its bag's largest; equal ones share."""
    rows = rows.masked_fill(share == 0, -torch.inf)
    start = rows.new_full((count, rows.shape[1]), -torch.inf)
    best = start.scatter_reduce(0, bags.unsqueeze(-1).expand_as(rows), rows, "amax")
    hit = ((rows == best[bags]) & (share > 0)).to(rows.dtype)
    return hit / _total(hit, bags, count).clamp(min=1)[bags]
