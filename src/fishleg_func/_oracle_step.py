r"""Oracles of a step of FishLeg, part of ``fishleg_func.reference``: dense and in float64."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._oracles import (
    FAMILIES,
    Lam,
    _fisher,
    _forward,
    _losses,
    _one_of,
    _rows,
    auxiliary_loss,
    block_diag,
    dense_q,
    level_leading,
    surrogate,
)

Moments = Mapping[str, tuple[Tensor, Tensor]]  # running means of the gradient and of its square, by name


class Block(NamedTuple):
    r"""Hold the Q of one block: :math:`Q = Q_\lambda` as in ``dense_q``.

    Attributes:
        family: Name of the family, a key of ``FAMILIES``.
        lam: Learned tensors lambda, by name; names and shapes are those of ``dense_q``.
        basis: Fixed tensors of the basis, by name; None stands for the identity.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> block = reference.Block("dense", {"L": 2 * torch.eye(2)})
        >>> reference.dense_q(block.family, block.lam, shape=(1, 2)).diagonal()
        tensor([4., 4.], dtype=torch.float64)
    """

    family: str
    lam: Lam
    basis: Lam | None = None


class StepResult(NamedTuple):
    r"""Hold what one training step returns, in float64.

    Attributes:
        loss: Negative log-likelihood before the update, ``[]``.
        theta: Parameters :math:`\theta` after the update, ``[P]``.
        momentum: Average of the gradients, m, or of the directions, p, under the rule "after": ``[P]``.
        direction: p, ``[P]``: :math:`Q m`, or the averaged p under "after".
        blocks: Q after the step, by block, with the new lambda.
        auxiliary_loss: A at the old lambda and the scaled probe, ``[]``; None if nothing was to be learned.
        moments: Adam's moments, by block and name; empty under the rule "relative".

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> model, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> blocks = {"(root)": reference.Block("diagonal", {"s": torch.zeros(1, 1)})}
        >>> options = dict(lr=1.0, beta=0.0, weight_decay=0.0, damping=1.0, step_norm=None)
        >>> out = reference.training_step(model, one, one, "gaussian", blocks, momentum=one[0], **options)
        >>> bool(out.momentum == out.direction), out.auxiliary_loss  # Q is the identity, and nothing is learned
        (True, None)
    """

    loss: Tensor  # [], before the update
    theta: Tensor  # [P], parameters after the update
    momentum: Tensor  # [P], m, or the averaged p ("after")
    direction: Tensor  # [P], p: Q m, or the averaged p ("after")
    blocks: dict[str, Block]  # with the new lambda
    auxiliary_loss: Tensor | None  # [], A at the old lambda and the scaled u; None unless learn
    moments: dict[str, Moments]  # Adam's, by block; empty under the rule "relative"


def names(model: nn.Module) -> list[str]:
    r"""Return the qualified names of the trainable parameters.

    Their order is that of the flat vector :math:`\theta`, and of ``named_parameters()``; a shared one is named once.

    Args:
        model: Any module.

    Returns:
        The names.

    Example:
        >>> from torch import nn
        >>> from fishleg_func import reference
        >>> reference.names(nn.Sequential(nn.Linear(2, 1), nn.Tanh()))
        ['0.weight', '0.bias']
    """
    return [name for name, p in model.named_parameters() if p.requires_grad]


def flat_parameters(model: nn.Module) -> Tensor:
    r"""Return a copy of the trainable parameters in one vector.

    :math:`\theta` holds them one after the other in the order of ``names``, each row-major.

    Args:
        model: Any module, with P trainable parameters.

    Returns:
        :math:`\theta`, ``[P]``, float64.

    Example:
        >>> from torch import nn
        >>> from fishleg_func import reference
        >>> reference.flat_parameters(nn.LayerNorm(2))
        tensor([1., 1., 0., 0.], dtype=torch.float64)
    """
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters() if p.requires_grad])


_TWO_SIDED = ("kfac", "kronecker", "scaled_kronecker", "eigen")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_PAIRED = (
    nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_NORMS
)  # fmt: skip


def block_indices(model: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    r"""Return where the parameters of each block lie in the flat vector.

    .. math:: \operatorname{vec} U = \theta[\text{indices}]

    A weight is packed with the bias beside it into ``[out, rest + 1]``, or ``[groups, out, rest + 1]``, where it is
    that of a Linear, ConvNd, Bilinear, recurrent layer or cell, or the stacked one of attention (three groups); a
    ConvTransposeNd is packed like the ConvNd that does the same to a stuffed input; weight and bias of a norm are
    ``[channels, 1, 2]``. The block has the module's name ("(root)" for the model itself) if its weight is called
    "weight", else that of the weight. A parameter elsewhere, or tied, or whose layer has a tied or frozen weight,
    stands alone as ``[1, P]`` or ``[shape[0], rest]``. Frozen ones are left out.

    Args:
        model: Any module; it is not changed.

    Returns:
        By block, the positions in the order of the row-major vec of its packed U, and the shape of U.

    Example:
        >>> from torch import nn
        >>> from fishleg_func import reference
        >>> reference.block_indices(nn.Linear(2, 2))
        {'(root)': (tensor([0, 1, 4, 2, 3, 5]), (2, 3))}
    """
    slots = [p for module in model.modules() for _, p in module.named_parameters(recurse=False, remove_duplicate=False)]
    alone, untied, start = {}, set(), 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            alone[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
            untied |= {name} if sum(p is slot for slot in slots) == 1 else set()
            start += p.numel()
    packed = {}
    for prefix, module in model.named_modules():
        local = [name for name, _ in module.named_parameters(recurse=False)]
        for key in local if isinstance(module, _PAIRED) else ():
            weight, bias = (f"{prefix}.{k}" if prefix else k for k in (key, key.replace("weight", "bias")))
            norm = isinstance(module, _NORMS)
            if weight not in untied or weight == bias or (norm and bias not in untied) or alone[weight].ndim < 2 - norm:
                continue
            U, groups = alone.pop(weight), 3 if key == "in_proj_weight" else getattr(module, "groups", 1)
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                U = torch.cat([W.transpose(0, 1) for W in U.chunk(groups)]).flip(list(range(2, U.ndim)))
            groups = U.numel() if norm else groups
            U = U.reshape(groups, -1, 1 if norm else U[0].numel())
            U = torch.cat([U, alone.pop(bias).reshape(*U.shape[:2], 1)], 2) if bias in untied else U
            packed[(prefix or "(root)") if key == "weight" else weight] = U[0] if len(U) == 1 else U
    packed |= {name: x.reshape(len(x) if x.ndim > 1 else 1, -1) for name, x in alone.items()}
    return {name: (U.reshape(-1), tuple(U.shape)) for name, U in packed.items()}


def relative_update(family: str, lam: Lam, gradients: Lam, aux_lr: float) -> dict[str, Tensor]:
    r"""Return lambda after one relative step.

    .. math:: L \leftarrow L (I - \eta \bar G_L), \qquad R \leftarrow (I - \eta \bar G_R) R, \qquad
              s \leftarrow s - \eta \operatorname{clamp}(\operatorname{numel}(s)\, \partial A / \partial s, -1, 1)

    :math:`G_L = L^\top \partial A / \partial L`, :math:`G_R = (\partial A / \partial R) R^\top` and, for each matrix of
    a stack on its own, :math:`\bar G = G / \max(1, \lVert G \rVert_F)`.

    Args:
        family: Name of the family, a key of ``FAMILIES``.
        lam: Lambda, by name: ``L``, ``R`` or ``s``, shaped as in ``dense_q``.
        gradients: :math:`\partial A / \partial \lambda`, with the names and shapes of ``lam``.
        aux_lr: Rate :math:`\eta`.

    Returns:
        The new lambda, with the names and shapes of ``lam``, float64.

    Raises:
        ValueError: If the family is unknown.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> L, slope = torch.tensor([[2.0]]), torch.tensor([[0.25]])
        >>> reference.relative_update("dense", {"L": L}, {"L": slope}, 0.2)
        {'L': tensor([[1.8000]], dtype=torch.float64)}
    """
    _one_of("family", family, FAMILIES)
    new = {}
    for key, x in lam.items():
        old, d = x.detach().double(), gradients[key].double()
        if key == "s":
            new[key] = old - aux_lr * (old.numel() * d).clamp(-1, 1)
            continue
        G = old.mT @ d if key == "L" else d @ old.mT
        step = aux_lr * G / torch.linalg.matrix_norm(G, keepdim=True).clamp(min=1)
        new[key] = old - (old @ step if key == "L" else step @ old)
    return new


def adam_update(
    lam: Lam, gradients: Lam, moments: Moments, step: int, aux_lr: float, betas: tuple[float, float], eps: float
) -> tuple[dict[str, Tensor], Moments]:
    r"""Return lambda and the moments after one bias-corrected update of Adam.

    .. math:: a \leftarrow \beta_1 a + (1 - \beta_1) d, \qquad b \leftarrow \beta_2 b + (1 - \beta_2) d^2, \qquad
              \lambda \leftarrow \lambda
              - \eta \frac{a / (1 - \beta_1^k)}{\sqrt{b / (1 - \beta_2^k)} + \epsilon}

    Args:
        lam: Lambda, by name, of any shapes.
        gradients: Gradients d, with the names and shapes of ``lam``.
        moments: ``(a, b)`` from the last update, by name, each of the shape in ``lam``; one that is not there is zero.
        step: Number k of this update: 1, 2, ...
        aux_lr: Rate :math:`\eta`.
        betas: Decays :math:`(\beta_1, \beta_2)` of the moments, each in [0, 1).
        eps: :math:`\epsilon`, added to the root.

    Returns:
        The new lambda and the new moments, with the names and shapes of ``lam``, float64.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> lam = gradients = {"s": torch.ones(1)}
        >>> reference.adam_update(lam, gradients, {}, 1, 0.25, (0.9, 0.999), 0.0)[0]
        {'s': tensor([0.7500], dtype=torch.float64)}

    References:
        Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """
    new, means = {}, {}
    for key, x in lam.items():
        d = gradients[key].double()
        a, b = moments.get(key, (torch.zeros_like(d), torch.zeros_like(d)))
        a, b = betas[0] * a + (1 - betas[0]) * d, betas[1] * b + (1 - betas[1]) * d**2
        scale = (b / (1 - betas[1] ** step)).sqrt() + eps
        new[key], means[key] = x.detach().double() - aux_lr * a / (1 - betas[0] ** step) / scale, (a, b)
    return new, means


def _whole(blocks: Mapping[str, Block], layout: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> Tensor:
    if set(blocks) != set(layout):
        raise ValueError(f"blocks={sorted(blocks)} must be {sorted(layout)}; give each its Q")
    packed = block_diag(*(dense_q(b.family, b.lam, b.basis, shape=layout[name][1]) for name, b in blocks.items()))
    back = torch.cat([layout[name][0] for name in blocks]).argsort()
    return packed[back][:, back]


def training_step(
    model: nn.Module, inputs: Any, targets: Tensor, likelihood: str, blocks: Mapping[str, Block], *,
    momentum: Tensor, lr: float, beta: float, weight_decay: float, damping: float, step_norm: str | None,
    momentum_rule: str = "before", kl_clip: float = 1e-3, learn: bool = False, aux_rule: str = "relative",
    aux_lr: float = 0.2, precondition_aux: bool = False, sigma: float = 1.0, ignore_index: int = -100,
    aux_betas: tuple[float, float] = (0.9, 0.999), aux_eps: float = 1e-8, aux_step: int = 1,
    moments: Mapping[str, Moments] | None = None, curvature: Tensor | None = None, probe: Tensor | None = None,
    scale_free: bool = False, warmup_rank: int = 0, last: str | None = None,
) -> StepResult:  # fmt: skip
    r"""Return one whole step: gradient, update of lambda if ``learn``, momentum, Q, step norm, parameters.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad p = Q m, \qquad
              \theta \leftarrow \theta - \eta\, (s(p) + wd\, \theta)

    with the momentum rule "before"; "nesterov" steps along :math:`\beta p + (1 - \beta) Q g` in place of p; with
    "after", :math:`p \leftarrow \beta p + (1 - \beta) Q g` is averaged instead.
    g is the gradient of the loss. The step norm s is the identity, or "layer": each block of p is scaled to the norm
    :math:`\sqrt{k \min(m, n)}`, from the shape of its U with k groups; or "kl": p is scaled by
    :math:`\min(1, \sqrt{c / (\eta^2 m^\top p)})`, c being ``kl_clip``; with "nesterov" m and p are those that the step
    is along. With "layer" and a ``warmup_rank`` the directions of Kronecker and eigen blocks with two sides of twice
    that are scaled after ``level_leading``, but for ``last``.

    Args:
        model: Any module, in the mode that it is in, with P trainable parameters; it is not changed.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.
        targets: Observations, shaped like the outputs; for "categorical" the classes, without the last dimension.
        likelihood: "gaussian", "bernoulli", "categorical" or "poisson".
        blocks: Q before the step, by block; the names are those of ``block_indices``.
        momentum: The average before the step, ``[P]``: m, or p under the rule "after".
        lr: Learning rate :math:`\eta`.
        beta: Decay :math:`\beta` of the momentum.
        weight_decay: Decoupled weight decay wd.
        damping: :math:`\gamma` > 0, in the units of F.
        step_norm: None, "layer" or, but not under the rule "after", "kl".
        momentum_rule: "before" Q or "after" it, or "nesterov".
        kl_clip: Bound on the predicted divergence :math:`\eta^2 s^\top Q^{-1} s` of a step, for "kl".
        learn: Whether lambda is updated before it is used.
        aux_rule: "relative", with the probe scaled to :math:`u^\top Q u = 1`, or "adam", with
            :math:`\lVert u \rVert = 1`.
        aux_lr: Rate of the update of lambda.
        precondition_aux: Whether lambda descends the preconditioned ``surrogate``.
        sigma: Standard deviation of "gaussian", > 0; the others do not read it.
        ignore_index: Class that marks what is not a term, for "categorical" only.
        aux_betas: Decays of Adam's moments.
        aux_eps: Adam's :math:`\epsilon`.
        aux_step: Number of this update of lambda for Adam: 1, 2, ...
        moments: Adam's moments by block, as in the last result; by default zeros.
        curvature: Matrix in place of the exact F, ``[P, P]``.
        probe: u before its scaling, ``[P]``; by default the gradient.
        scale_free: Whether the scale of Q does not count for what lambda descends, in "kfac" blocks.
        warmup_rank: Singular values that are made alike, in the directions of the first steps; 0 for none.
        last: The block that is called last.

    Returns:
        What the step computed and the state after it; the model and the arguments are not changed.

    Raises:
        ValueError: If an option is not one of the above or ``blocks`` does not name the blocks of the model.

    Example:
        A quadratic, solved in one step:

        >>> import torch
        >>> from fishleg_func import reference
        >>> model, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> blocks = {"(root)": reference.Block("diagonal", {"s": torch.zeros(1, 1)})}
        >>> options = dict(lr=1.0, beta=0.0, weight_decay=0.0, damping=1.0, step_norm=None)
        >>> reference.training_step(model, one, 5 * one, "gaussian", blocks, momentum=one[0], **options).theta
        tensor([5.], dtype=torch.float64)

    References:
        Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023.
    """
    _one_of("momentum_rule", momentum_rule, ("before", "after", "nesterov"))
    _one_of("step_norm", step_norm, (None, "layer") if momentum_rule == "after" else (None, "layer", "kl"))
    _one_of("aux_rule", aux_rule, ("relative", "adam"))
    layout, theta, new, means, auxiliary = block_indices(model), flat_parameters(model), dict(blocks), {}, None
    outputs, parameters = _forward(model, inputs)
    loss = _losses(outputs, targets, likelihood, sigma, ignore_index).mean()
    g = _rows(loss, parameters)[0]
    if learn:
        given = (outputs, parameters, targets, likelihood, sigma, ignore_index)
        F = _fisher(*given) if curvature is None else curvature
        for name, b in blocks.items():
            new[name] = b._replace(lam={key: x.detach().double().requires_grad_() for key, x in b.lam.items()})
        q, u = _whole(new, layout), g if probe is None else probe.double()
        size = (u @ q.detach() @ u).sqrt() if aux_rule == "relative" else u.norm()
        u = u / size if size > 0 else u
        free = [layout[name][0] for name, b in blocks.items() if scale_free and b.family == "kfac"]
        value = surrogate(F, damping, q, u, precondition_aux, free)
        auxiliary = auxiliary_loss(F, damping, q, u).detach()
        for name, b in list(new.items()):
            slopes = torch.autograd.grad(value, list(b.lam.values()), retain_graph=True)
            slope, old = dict(zip(b.lam, slopes, strict=True)), (moments or {}).get(name, {})
            lam = relative_update(b.family, b.lam, slope, aux_lr)
            if aux_rule == "adam":
                lam, means[name] = adam_update(b.lam, slope, old, aux_step, aux_lr, aux_betas, aux_eps)
            new[name] = b._replace(lam=lam)
    q = _whole(new, layout).detach()
    m = beta * momentum.double() + (1 - beta) * (q @ g if momentum_rule == "after" else g)
    p = m if momentum_rule == "after" else q @ m
    ahead = beta * m + (1 - beta) * g if momentum_rule == "nesterov" else m
    d = q @ ahead if momentum_rule == "nesterov" else p
    s = d * (kl_clip / (lr**2 * (ahead @ d))).sqrt().clamp(max=1) if step_norm == "kl" else d.clone()
    for name, (where, shape) in layout.items() if step_norm == "layer" else ():
        U, norm = d[where].view(shape), d[where].norm()
        two_sided = blocks[name].family in _TWO_SIDED and name != last
        if warmup_rank and two_sided and min(shape[-2:]) >= 2 * warmup_rank:
            U = level_leading(U, warmup_rank)
        length = math.sqrt(math.prod(shape[:-2]) * min(shape[-2:]))
        s[where] = U.reshape(-1) * length / norm if norm > 0 else 0.0
    return StepResult(loss.detach(), theta - lr * s - lr * weight_decay * theta, m, p, new, auxiliary, means)
