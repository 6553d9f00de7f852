"""The call of the original FishLeg, in terms of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._resolve import as_likelihood
from .likelihoods import Likelihood

_DEFAULTS = {"lr": 5e-2, "weight_decay": 1e-5, "damping": 0.5, "aux_lr": 1e-4}  # the original's
_METHOD = {
    "aux_rule": "adam",
    "precondition_aux": True,
    "momentum": "after",
    "step_norm": None,
    "q": {"*": "scaled_kronecker"},
}  # what it does
_OWN = ("eps", "pre_aux_training", "sgd_lr", "device", "draw")  # arguments that only the original has
_MOVED = {
    "fish_lr": "lr",
    "aux_dataloader": "aux_loader",
    "u_sampling": "u",
    "method": "fisher",
    "method_kwargs": "nothing in its place",
    "module_names": "include",
    "skip_names": "exclude",
    "scale": "sgd_lr",
    "fish_scale": "sgd_lr",
    "init_scale": "sgd_lr",
    "warmup": "nothing in its place",
    "warmup_steps": "nothing in its place",
    "warmup_data": "nothing in its place",
    "warmup_loss": "nothing in its place",
    "normalization": "nothing in its place",
    "normalize_aux": "nothing in its place",
    "num_steps": "nothing in its place",
    "batch_speedup": "nothing in its place",
    "full": "q",
    "config": "nothing in its place",
    "fine_tune": "update_aux_every=0",
    "initialization": "nothing in its place",
    "writer": "what fishleg.update_aux and fishleg.accuracy return",
    "aux_log": "what fishleg.update_aux and fishleg.accuracy return",
    "verbose": "report()",
}


class Start(NamedTuple):
    """What the original does before its first step.

    Attributes:
        updates: Auxiliary updates.
        scale: Factor of the first Q.
    """

    updates: int
    scale: float


class _Returning(nn.Module):
    """Stands for a model whose outputs are known."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._outputs


class _FromFunctions(Likelihood):
    """A likelihood made of ``draw(model, x)`` and ``nll(model, (x, y))``."""

    def __init__(self, draw: Callable[..., Any], nll: Callable[..., Tensor]) -> None:
        self._draw, self._nll = draw, nll

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._nll(_Returning(outputs), (outputs, targets))

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        where = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=where))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn = self._draw(_Returning(outputs), outputs)
        targets: Tensor = drawn[1] if isinstance(drawn, tuple) else drawn
        return targets

    def __repr__(self) -> str:
        return f"draw={self._draw!r}, nll={self._nll!r}"


def translate(
    model: nn.Module, likelihood: Any, nll: Any, aux_loader: Iterable[Any] | None, options: dict[str, Any]
) -> tuple[Likelihood | None, Iterable[Any] | None, dict[str, Any], Start | None]:
    """Return likelihood, loader and options in our terms; of our own call they are returned as they are.

    The original's call is known by its third positional argument, or by an argument that only it has.

    Args:
        model: The model.
        likelihood: A likelihood, or the function ``draw(model, x)``.
        nll: The function ``nll(model, (x, y))``, or, after a likelihood, the loader.
        aux_loader: Batches for Q.
        options: All other arguments.

    Returns:
        Those three, and what is to be done before the first step.

    Raises:
        TypeError: If an argument was renamed or dropped, or the three do not go together.
        ValueError: If ``device`` is not where the model is.
    """
    moved = [f"{name} (use {_MOVED[name]})" for name in options if name in _MOVED]
    if moved:
        raise TypeError(f"arguments of the original were renamed or dropped: {', '.join(moved)}; see docs/migration.md")
    options = dict(options)
    own = {name: options.pop(name) for name in _OWN if name in options}
    if nll is None and not own:
        return None if likelihood is None else as_likelihood(likelihood), aux_loader, options, None
    draw = own.get("draw", likelihood)
    if hasattr(nll, "nll") and hasattr(draw, "__iter__") and aux_loader is None:  # (model, aux_loader, likelihood)
        draw, nll, aux_loader = nll, None, draw
    if not callable(nll) and nll is not None and aux_loader is None:  # (model, likelihood, aux_loader)
        nll, aux_loader = None, nll
    if hasattr(aux_loader, "nll") or (nll is None and not hasattr(draw, "nll")) or aux_loader is None:
        raise TypeError(
            "the original's call must be FishLeg(model, draw, nll, aux_loader, ...) with functions draw(model, x) and "
            "nll(model, (x, y)), or FishLeg(model, likelihood, aux_loader, ...); use FishLeg(model, likelihood, ...)"
        )
    chosen = as_likelihood(draw) if nll is None else _FromFunctions(draw, nll)
    device, where = own.get("device"), next(model.parameters()).device
    if device is not None and torch.device(device).type != where.type:
        raise ValueError(f"device={device!r} must be {str(where)!r}, where the model is; move the model with .to()")
    if "eps" in own:
        warnings.warn("eps has no effect: Fisher products are exact, not finite differences", stacklevel=3)
    options = {**_DEFAULTS, **_METHOD, **options}
    sgd_lr = own.get("sgd_lr")
    scale = 1.0 if sgd_lr is None else float(sgd_lr) / float(options["lr"])
    return chosen, aux_loader, options, Start(int(own.get("pre_aux_training", 0)), scale)
