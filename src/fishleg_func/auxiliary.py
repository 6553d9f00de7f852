r"""The auxiliary update: one step of λ on the Legendre-dual loss.

.. math:: A(\lambda) = \tfrac12 v^\top (F + \gamma I) v - u^\top v, \qquad v = Q(\lambda) u

Its gradient in v is :math:`w = (F + \gamma I)v - u`, so its gradient in λ is that of
:math:`\langle w, Q(\lambda) u \rangle` with w held constant. Two rules move λ: ``relative`` (multiplicative, from the
gradients in whitened coordinates) and ``adam`` (the paper's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._trees import add, assign_, inner, inverse_or_zero, scale, total
from ._types import Packed, Params
from .qmodules import Carry, QModule, Roots

RULES = ("relative", "adam")

Moments = dict[str, dict[str, Tensor]]
Carries = dict[str, Carry | None]
Rule = Callable[["Probe", Mapping[str, QModule], Tensor | None], Carries]


class Probe(NamedTuple):
    r"""Everything an auxiliary update is made of, by block name.

    Attributes:
        operators: What each Q is applied with.
        u: Scaled probe.
        v: Q u.
        w: Gradient of A in v, preconditioned where asked for.
        square: :math:`u^\top Qu`, 0-d.
        loss: A(λ), 0-d.
        parts: Its terms by block, in the order of the operators; A is their sum.
    """

    operators: Mapping[str, Roots]
    u: Mapping[str, Packed]
    v: Mapping[str, Packed]
    w: Mapping[str, Packed]
    square: Tensor
    loss: Tensor
    parts: Tensor


def probe(
    q: Mapping[str, QModule],
    operators: Mapping[str, Roots],
    u: Mapping[str, Packed],
    fisher: Callable[[Mapping[str, Packed]], Mapping[str, Packed]],
    damping: Mapping[str, Tensor],
    *,
    unit: str,
    preconditioned: bool,
    scale_free: bool = False,
    outdated: bool = False,
) -> Probe:
    r"""Scale the probe, evaluate A and its gradient in v.

    Args:
        q: Q modules.
        operators: What they are applied with.
        u: Probe direction; zero gives A = 0 and w = 0.
        fisher: :math:`v \mapsto Fv` over all blocks together.
        damping: γ of each block, 0-d.
        unit: ``"relative"`` scales u so that :math:`u^\top Qu = 1`, ``"adam"`` so that :math:`\|u\| = 1`.
        preconditioned: Replace w by Qw.
        scale_free: Whether the scale of each Q does not count. Then w is that of A at the best scale of each v, and
            orthogonal to v, zero where no positive scale is best; in families whose rule keeps it so.
        outdated: Apply Q through its roots: the operators are not yet those of the basis, but will be when λ moves.

    Returns:
        The probe.
    """

    def apply(name: str, x: Packed) -> Packed:
        qx: Packed = q[name](x) if outdated else q[name].act(operators[name], x)
        return qx

    v = {k: apply(k, u[k]) for k in q}
    measured = v if unit == "relative" else u
    factor = inverse_or_zero(total(inner(u[k], measured[k]) for k in q).clamp(min=0).sqrt())
    u, v = {k: scale(x, factor) for k, x in u.items()}, {k: scale(x, factor) for k, x in v.items()}
    fv = fisher(v)
    quadratics = torch.stack([inner(v[k], fv[k]) + damping[k] * inner(v[k], v[k]) for k in q])
    squares = torch.stack([inner(u[k], v[k]) for k in q])
    free = squares.new_tensor([scale_free and module.scale_free for module in q.values()])
    best = torch.where(free > 0, squares.clamp(min=0) * inverse_or_zero(quadratics), 1)
    minus = -(best > 0).to(best.dtype)
    w = {
        k: add(scale(fv[k], c), add(scale(u[k], sign), scale(v[k], c * damping[k])))
        for k, c, sign in zip(q, best.unbind(), minus.unbind(), strict=True)
    }
    square = squares.sum()
    if preconditioned:
        w = {k: apply(k, w[k]) for k in q}
    return Probe(operators, u, v, w, square, 0.5 * quadratics.sum() - square, 0.5 * quadratics - squares)


def make_relative(rate: Tensor) -> Rule:
    r"""Return the multiplicative rule, ``(probe, q, ok) -> carries``, see :meth:`QModule.retract_`.

    :math:`L \leftarrow L(I - \eta G_L / \max(1, \|G_L\|_F))`.

    Args:
        rate: η = ``aux_lr``, 0-d.
    """

    def update(p: Probe, q: Mapping[str, QModule], ok: Tensor | None) -> Carries:
        carries: Carries = {}
        for name, module in q.items():
            operator = p.operators[name]
            gradients = module.relative(operator, p.u[name], p.v[name], p.w[name])
            carries[name] = module.retract_(operator, gradients, rate, ok)
        return carries

    return update


def gradient(module: QModule, u: Packed, w: Packed) -> Params:
    r"""Return the gradient of :math:`\langle w, Q(\lambda)u \rangle` in λ, by autograd through the factored form.

    Args:
        module: A Q module.
        u: Probe.
        w: Gradient of A in v, held constant.
    """

    def surrogate(lam: Params) -> Tensor:
        v: Packed = torch.func.functional_call(module, lam, (u,))
        return inner(w, v)

    result: Params = torch.func.grad(surrogate)({name: p.detach() for name, p in module.named_parameters()})
    return result


class Adam:
    r"""Adam on λ, the paper's rule (Kingma & Ba, 2015).

    Args:
        q: Q modules.
        rate: ``aux_lr``, 0-d.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
    """

    def __init__(self, q: Mapping[str, QModule], rate: Tensor, betas: tuple[float, float], eps: float) -> None:
        self.rate, self.betas, self.eps = rate, betas, eps
        self.first: Moments = {k: {n: torch.zeros_like(p) for n, p in m.named_parameters()} for k, m in q.items()}
        self.second: Moments = {k: {n: torch.zeros_like(p) for n, p in m.named_parameters()} for k, m in q.items()}
        self.count = torch.zeros_like(rate, dtype=torch.int64)  # 0-d: updates so far

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name: the moments and the count, the tensors themselves."""
        moments = {"first": self.first, "second": self.second}
        named = {f"{m}.{k}.{n}": t for m, of in moments.items() for k, block in of.items() for n, t in block.items()}
        return {"count": self.count, **named}

    def __call__(self, p: Probe, q: Mapping[str, QModule], ok: Tensor | None) -> Carries:
        """Update λ in place; with ``ok`` false, nothing is changed. A zero probe moves nothing either."""
        moved = p.square > 0
        ok = moved if ok is None else ok & moved
        assign_(self.count, self.count + 1, ok)
        beta_1, beta_2 = self.betas
        count = self.count.double()
        correction_1, correction_2 = 1 - beta_1**count, 1 - beta_2**count
        for key, module in q.items():
            for name, g in gradient(module, p.u[key], p.w[key]).items():
                lam, first, second = getattr(module, name), self.first[key][name], self.second[key][name]
                assign_(first, torch.lerp(first, g, 1 - beta_1), ok)
                assign_(second, torch.lerp(second, g.square(), 1 - beta_2), ok)
                denominator = (second / correction_2).sqrt() + self.eps
                assign_(lam, lam - self.rate * (first / correction_1) / denominator, ok)
            module.renew_(p.operators[key], ok)
        return dict.fromkeys(q)
