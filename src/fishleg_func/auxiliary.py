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
from .qmodules import QModule, Roots

RULES = ("relative", "adam")

Moments = dict[str, dict[str, Tensor]]
Rule = Callable[["Probe", Mapping[str, QModule], Tensor | None], None]


class Probe(NamedTuple):
    """Everything an auxiliary update is made of, by block name.

    Attributes:
        roots: What each Q is made of.
        u: Scaled probe.
        uz: The probe whitened, Bᵀu.
        w: Gradient of A in v, preconditioned where asked for.
        loss: A(λ), 0-d.
    """

    roots: Mapping[str, Roots]
    u: Mapping[str, Packed]
    uz: Mapping[str, Packed]
    w: Mapping[str, Packed]
    loss: Tensor


def probe(
    q: Mapping[str, QModule],
    roots: Mapping[str, Roots],
    u: Mapping[str, Packed],
    fisher: Callable[[Mapping[str, Packed]], Mapping[str, Packed]],
    damping: Tensor,
    *,
    unit: str,
    preconditioned: bool,
) -> Probe:
    r"""Scale the probe, evaluate A and its gradient in v.

    Args:
        q: Q modules.
        roots: Their roots.
        u: Probe direction; zero gives A = 0 and w = 0.
        fisher: :math:`v \mapsto Fv` over all blocks together.
        damping: γ, 0-d.
        unit: ``"relative"`` scales u so that :math:`u^\top Qu = 1`, ``"adam"`` so that :math:`\|u\| = 1`.
        preconditioned: Replace w by Qw.

    Returns:
        The probe.
    """
    uz = {k: q[k].whiten(roots[k], u[k]) for k in q}
    measured = uz if unit == "relative" else u
    factor = inverse_or_zero(total(inner(x, x) for x in measured.values()).clamp(min=0).sqrt())
    u, uz = {k: scale(x, factor) for k, x in u.items()}, {k: scale(x, factor) for k, x in uz.items()}
    v = {k: q[k].color(roots[k], uz[k]) for k in q}
    fv = fisher(v)
    minus = -torch.ones_like(factor)
    w = {k: add(add(fv[k], scale(u[k], minus)), scale(v[k], damping)) for k in q}
    quadratic = total(inner(v[k], fv[k]) + damping * inner(v[k], v[k]) for k in q)
    loss = 0.5 * quadratic - total(inner(uz[k], uz[k]) for k in q)
    if preconditioned:
        w = {k: q[k].color(roots[k], q[k].whiten(roots[k], w[k])) for k in q}
    return Probe(roots, u, uz, w, loss)


def make_relative(rate: Tensor) -> Rule:
    r"""Return the multiplicative rule, ``(probe, q, ok) -> None``.

    :math:`L \leftarrow L(I - \eta G_L / \max(1, \|G_L\|_F))`.

    Args:
        rate: η = ``aux_lr``, 0-d.
    """

    def update(p: Probe, q: Mapping[str, QModule], ok: Tensor | None) -> None:
        for name, module in q.items():
            wz = module.whiten(p.roots[name], p.w[name])
            module.retract_(module.relative(p.roots[name], p.u[name], p.w[name], p.uz[name], wz), rate, ok)

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

    def __call__(self, p: Probe, q: Mapping[str, QModule], ok: Tensor | None) -> None:
        """Update λ in place; with ``ok`` false, nothing is changed. A zero probe moves nothing either."""
        moved = total(inner(x, x) for x in p.uz.values()) > 0
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
