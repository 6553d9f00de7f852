"""Functions that ``torch.compile`` calls as they are, instead of compiling them.

What is made of large matrix products has nothing to gain from being compiled: most of the time to the first compiled
step would go into small kernels between the products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R", Tensor, None)

LONG = 128  # length of a side from which calling its functions costs little beside their products


def opaque(schema: str, *, mutates: tuple[str, ...] = (), result: Callable[P, R]) -> Callable[..., Callable[P, R]]:
    """Make a function an operator of torch; compiled code calls the operator, eager code the function.

    Args:
        schema: Types of arguments and results, in torch's notation.
        mutates: Arguments that are written into.
        result: From the arguments to an empty tensor like the result, or to ``None`` where there is none.

    Returns:
        What turns the function into one that calls either.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        name = f"fishleg_func::{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        operator.register_fake(result)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            compiled: Callable[P, R] = operator if torch.compiler.is_compiling() else function
            return compiled(*args, **kwargs)

        return call

    return wrap


def refused(ok: Tensor | None) -> bool:
    """Tell whether ``ok``, a 0-d bool or ``None``, is false, where reading it costs nothing; elsewhere say no."""
    return ok is not None and readable(ok) and not ok


def unless_granted(ok: Tensor | None) -> Tensor | None:
    """Return ``None`` where ``ok`` is known to be true at no cost, else ``ok``."""
    return None if ok is not None and readable(ok) and ok else ok


def readable(scalar: Tensor) -> bool:
    """Tell whether the value of a 0-d tensor may be read: not while compiling, nor from a device that runs behind."""
    return not torch.compiler.is_compiling() and scalar.device.type == "cpu"
