"""``fishlegify``: from a model and a likelihood to a stepping function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, auxiliary, fisher
from ._resolve import as_likelihood, usual_weight_decay
from ._types import Hyper, Options
from .batch import Runner
from .likelihoods import Likelihood
from .momentum import RULES as momentum_rules
from .step import FishLegStep
from .transform import Family, make_plan, unwrapped

_KL_CLIP = 1e-3  # nats
_RELATIVE_DAMPING = 0.03
_ADAM_LIMIT = 0.1  # an aux_lr for the relative rule would ruin λ under Adam


def fishlegify(
    model: nn.Module,
    likelihood: Likelihood | Any | None = None,
    *,
    lr: float = 3e-2,
    beta: float = 0.9,
    momentum: str = "nesterov",
    weight_decay: float | None = None,
    damping: float | None = None,
    update_aux_every: int | None = None,
    aux_rule: str = "relative",
    aux_lr: float = 0.2,
    aux_betas: tuple[float, float] = (0.9, 0.999),
    aux_eps: float = 1e-8,
    precondition_aux: bool = False,
    aux_batch_size: int | None = None,
    q: Family | Mapping[str, Family] = "kfac",
    fisher: str = "exact",
    u: str | None = None,
    step_norm: str | None = "layer",
    warmup_rank: int = 8,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> FishLegStep:
    r"""Return a function that trains ``model`` with natural-gradient steps, preconditioned by a learned inverse Fisher.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad
              \theta \leftarrow \theta - \eta\, s(Q(\lambda) (\beta m + (1 - \beta) g)) - \eta\, \mathrm{wd}\, \theta,
              \qquad
              Q(\lambda) \approx (F + \gamma I)^{-1}

    The model's code, ``parameters()`` and ``state_dict()`` are left alone; its layers get forward hooks that are inert
    outside of a step. ``fishlegify(model)`` alone works: the likelihood is then resolved from the first targets, class
    labels giving :class:`~fishleg_func.likelihoods.Categorical` and real targets shaped like the outputs a unit
    :class:`~fishleg_func.likelihoods.Gaussian`.

    Args:
        model: Any module; one wrapped by ``torch.compile`` is unwrapped.
        likelihood: What the model's outputs are the natural parameters of; ``None`` resolves it from the first targets.
        lr: Learning rate η. With ``step_norm="layer"`` it is relative to an orthogonal matrix of each layer's shape.
        beta: Decay of the momentum, in [0, 1).
        momentum: ``"before"`` averages gradients and applies Q to the average m; ``"nesterov"`` applies it to the
            average of m and g with weights β and 1 - β; ``"after"``, the paper's, averages Q g.
        weight_decay: Decoupled weight decay: parameters shrink by ``lr * weight_decay`` at every step. ``None`` is
            0.06 for a Categorical likelihood with ``step_norm="layer"``, whose steps do not become shorter as the model
            becomes certain, and else 0.
        damping: γ, in the units of the Fisher; ``None`` for 0.03 times the mean diagonal entry of the Fisher of the
            outputs, as it is along training, so that the scale of the loss does not matter. ``step.damping`` tells.
            Where outputs are certain, and wrong, from the start on, and ``step_norm`` is not ``"layer"``, give a value.
        update_aux_every: Steps between auxiliary updates of λ, and between statistics (the first ``update_aux_every``
            steps all make one). By default λ moves in the steps that refresh the bases, 320 steps apart in the long
            run, and statistics are 10 steps apart, or 5, 2 or 1 where the last ones were of fewer than 80, 40 or 16
            terms of the loss, masked ones counted. Where a family has no basis, λ moves at every tenth step, and the
            first 50 steps, if not more, all make an update. 0 never updates λ, which leaves the families' bases: K-FAC
            for ``"kfac"``.
        aux_rule: ``"relative"`` moves λ multiplicatively; ``"adam"`` is the paper's.
        aux_lr: Rate of the rule: 0.2 suits ``"relative"``, about 1e-3 ``"adam"``.
        aux_betas: Decay of Adam's two moments, with ``aux_rule="adam"``.
        aux_eps: Added to the root of Adam's second moment.
        precondition_aux: Precondition the gradient of the auxiliary loss with Q.
        aux_batch_size: Number of leading examples of a batch that curvature is taken from; ``None`` for all.
        q: Q family of the layers, ``"kfac"``, ``"kronecker"``, ``"scaled_kronecker"``, ``"eigen"``, ``"diagonal"``,
            ``"dense"``, ``"embedding"``, or a callable ``(shape, dtype=, device=) -> QModule``; or a dict from glob
            patterns on block, module or parameter names to these, the first match winning. ``"joint"`` is one dense
            matrix over all parameters together, for 4096 at most: the only one that knows how layers depend on
            each other.
        fisher: Fisher-vector product of the auxiliary loss: ``"exact"``, ``"sampled"``, ``"empirical"`` or
            ``"antithetic"``, see :func:`fisher_vector_product`.
        u: Probe direction: ``"gaussian"``, for all of the inverse, ``"gradient"``, for what gradients see, or
            ``"momentum"``. ``None`` is ``"gaussian"``, but ``"gradient"`` where any family starts from the identity.
            In layers with both sides of 128 and more Gaussian probes are of rank 16, and gradients estimated from 16
            evenly spaced rows, which bounds the cost of an update.
        step_norm: ``"layer"`` scales each layer's step to the Frobenius norm of an orthogonal matrix of its shape;
            ``"kl"`` bounds the predicted KL divergence of the step by ``step.hyper.kl_clip`` (1e-3 nats); ``None``
            takes the step as it is.
        warmup_rank: With ``step_norm="layer"`` the directions of the first ten steps (of those that take statistics,
            with an ``update_aux_every`` below ten) have so many leading singular values made alike: in layers of a
            Kronecker or eigen family whose sides are both twice as long or longer, but for the one that is called last.
            0 leaves them as they are.
        include: Glob patterns on parameter or module names: only what they match is trained.
        exclude: Glob patterns: what they match is not trained.
        output: From what the model returns to one tensor of natural parameters, for models that return objects.
        generator: Seeds the step's own random numbers; by default they are seeded from ``torch.initial_seed()``. The
            global random stream is not drawn from.

    Returns:
        The stepping function, ``loss = step(inputs, targets)``.

    Raises:
        RuntimeError: If several processes train together.
        TypeError: If the model or the likelihood is not one.
        ValueError: If an argument is out of its range, a pattern matches nothing, or there is nothing to train.

    Example:
        A linear model with a Gaussian likelihood and one exact natural-gradient step, K-FAC being exact here:

        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> step = ff.fishlegify(
        ...     model, ff.likelihoods.Gaussian(), lr=1.0, beta=0.0, damping=1e-12, step_norm=None, update_aux_every=0
        ... )
        >>> loss = step(x, 3 * x)
        >>> round(model.weight.item(), 4)
        3.0

    References:
        Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia & Hennequin, "Fisher-Legendre (FishLeg) optimization of deep
        neural networks", ICLR 2023.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module; pass the module itself")
    _checks.one_process()
    model = unwrapped(model)
    if generator is not None:
        _checks.kind("generator", generator, torch.Generator, "a torch.Generator")
    if output is not None and not callable(output):
        raise TypeError(f"output={output!r} must be a function from what the model returns to one tensor")
    options = Options(
        momentum, update_aux_every, aux_rule, precondition_aux, aux_batch_size, fisher, "gradient" if u is None else u,
        step_norm, warmup_rank,
    )  # fmt: skip
    _check(options, lr, beta, weight_decay, damping, aux_lr, aux_betas, aux_eps)
    likelihood = None if likelihood is None else as_likelihood(likelihood)
    weight_decay = usual_weight_decay(step_norm, likelihood) if weight_decay is None else weight_decay
    plan = make_plan(model, q, include, exclude)
    if u is None and all(module.has_basis for module in plan.q.values()):
        options = replace(options, u="gaussian")
    _checks.digits_for(fisher, model)
    every = [p for module in plan.q.values() for p in module.parameters()]
    device, dtype = every[0].device, max((p.dtype for p in every), key=lambda d: torch.finfo(d).bits)
    strays = {str(p.device) for p in model.parameters() if p.device != device}
    if strays:
        raise ValueError(
            f"parameters on {device} and {', '.join(sorted(strays))} must be on one device; move the model"
        )

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    hyper = Hyper(*map(scalar, (lr, 0.0, 0.0, aux_lr, weight_decay, beta, _KL_CLIP)))
    set_damping(hyper, damping)
    rule: auxiliary.Rule = auxiliary.make_relative(hyper.aux_lr)
    if aux_rule == "adam":
        rule = auxiliary.Adam(plan.q, hyper.aux_lr, aux_betas, aux_eps)
    seed = torch.initial_seed()
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    runner = Runner(model, plan, likelihood, output, device, probes=options.u == "gradient")
    return FishLegStep(runner, hyper, options, rule, seed)


def set_damping(hyper: Hyper, damping: float | None) -> None:
    """Fill in the fixed and the relative part of γ, of which one is zero; ``damping`` as in :func:`fishlegify`."""
    hyper.damping.fill_(0.0 if damping is None else damping)
    hyper.relative_damping.fill_(_RELATIVE_DAMPING if damping is None else 0.0)


def _check(
    options: Options,
    lr: float,
    beta: float,
    weight_decay: float | None,
    damping: float | None,
    aux_lr: float,
    aux_betas: tuple[float, float],
    aux_eps: float,
) -> None:
    """Validate the arguments that do not depend on the model."""
    small = "use a small value such as 1e-3"
    _checks.number("lr", lr, 0, math.inf, small, low_open=True)
    if damping is not None:
        _checks.number("damping", damping, 0, math.inf, f"{small}, or None", low_open=True)
    _checks.number("aux_lr", aux_lr, 0, math.inf, "use 0.2 with the relative rule, 1e-3 with Adam", low_open=True)
    if weight_decay is not None:
        _checks.number("weight_decay", weight_decay, 0, math.inf, "use 0 for none")
    _checks.number("beta", beta, 0, 1, "use 0.9, or 0 for no momentum")
    if options.update_aux_every is not None:
        _checks.integer("update_aux_every", options.update_aux_every, 0, "use 0 to never update λ")
    _checks.choice("precondition_aux", options.precondition_aux, (False, True))
    _checks.choice("momentum", options.momentum, momentum_rules)
    _checks.choice("aux_rule", options.aux_rule, auxiliary.RULES)
    _checks.choice("fisher", options.fisher, fisher.KINDS)
    _checks.choice("u", options.u, ("gradient", "momentum", "gaussian"))
    _checks.choice("step_norm", options.step_norm, (None, "kl", "layer"))
    _checks.integer("warmup_rank", options.warmup_rank, 0, "use 8, or 0 for none")
    if options.momentum == "after" and (options.step_norm == "kl" or options.u == "momentum"):
        raise ValueError(
            f"step_norm={options.step_norm!r}, u={options.u!r}: 'kl' and 'momentum' need the averaged gradient, and "
            "must go with momentum='nesterov' or 'before'"
        )
    if options.aux_batch_size is not None:
        _checks.integer("aux_batch_size", options.aux_batch_size, 1, "use None for the whole batch")
    if not isinstance(aux_betas, (tuple, list)) or len(aux_betas) != 2:
        raise ValueError(f"aux_betas={aux_betas} must be two numbers; use (0.9, 0.999)")
    for i, value in enumerate(aux_betas):
        _checks.number(f"aux_betas[{i}]", value, 0, 1, "use (0.9, 0.999)")
    _checks.number("aux_eps", aux_eps, 0, math.inf, "use 1e-8", low_open=True)
    if options.aux_rule == "relative":
        _checks.number("aux_lr", aux_lr, 0, 1, "λ stays invertible only below 1; use 0.2", low_open=True)
    elif aux_lr >= _ADAM_LIMIT:
        raise ValueError(f"aux_lr={aux_lr} must be < {_ADAM_LIMIT} with aux_rule='adam'; use 1e-3")
