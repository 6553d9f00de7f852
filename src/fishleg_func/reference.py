r"""Dense float64 oracles for every quantity of FishLeg (Garcia et al., ICLR 2023): simple, obviously right, not fast.

They share no code with what they check, form every matrix, and run on a float64 copy of the model. Flat vectors hold
the ``P`` trainable parameters in the order of ``names``, row-major. Arguments mean the same everywhere:

- ``model``: any module, in the mode it is in; its parameters, buffers, mode and gradients never change.
- ``inputs``: a tensor, a tuple (positional) or a dict (keywords).
- ``likelihood``: "gaussian" (standard deviation ``sigma``), "bernoulli", "categorical" or "poisson".
- ``outputs``: natural parameters (mean, logit, log-rate) ``[N, ...]``, a term each, or logits of classes ``[..., C]``.
- ``targets``: shaped like ``outputs``; classes ``[...]`` for "categorical", where ``ignore_index`` is not a term.
- ``fisher``: F, ``[P, P]``. ``damping``: gamma > 0, in the units of F. ``q``: Q, ``[P, P]``. ``u``: probe, ``[P]``.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FAMILIES = {  # family: (names of lambda, names of the basis)
    "kronecker": ({"L", "R"}, set()),
    "kfac": ({"L", "R"}, {"C_L", "C_R"}),
    "scaled_kronecker": ({"L", "R", "s"}, set()),
    "eigen": ({"s"}, {"C_L", "C_R", "c"}),
    "diagonal": ({"s"}, {"c"}),
    "dense": ({"L"}, set()),
    "embedding": ({"s", "L"}, {"c", "C_L"}),
}
Lam = Mapping[str, Tensor]
Moments = Mapping[str, tuple[Tensor, Tensor]]  # running means of the gradient and of its square, by name
block_diag: Callable[..., Tensor] = torch.block_diag


class Block(NamedTuple):
    """Hold the Q of one block: family, learned lambda and fixed basis (names and shapes in ``dense_q``)."""

    family: str
    lam: Lam
    basis: Lam | None = None


class StepResult(NamedTuple):
    """Hold what one training step returns, in float64."""

    loss: Tensor  # [], before the update
    theta: Tensor  # [P], parameters after the update
    momentum: Tensor  # [P], m ("before") or the averaged p ("after")
    direction: Tensor  # [P], p before the step norm: Q m ("before") or the averaged p ("after")
    blocks: dict[str, Block]  # with the new lambda
    auxiliary_loss: Tensor | None  # [], A at the old lambda and the scaled u; None unless learn
    moments: dict[str, Moments]  # Adam's, by block; empty under the rule "relative"


def _one_of(argument: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is not known here; use one of {', '.join(map(repr, allowed))}")


def _terms(outputs: Tensor, likelihood: str) -> Tensor:  # -> [terms, event]
    _one_of("likelihood", likelihood, ("gaussian", "bernoulli", "categorical", "poisson"))
    return outputs.reshape(-1, outputs.shape[-1]) if likelihood == "categorical" else outputs.reshape(len(outputs), -1)


def _losses(outputs: Tensor, targets: Tensor, likelihood: str, sigma: float, ignore_index: int) -> Tensor:  # [M]
    f = _terms(outputs.double(), likelihood)
    wanted = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
    if targets.shape != wanted:
        raise ValueError(f"targets of shape {tuple(targets.shape)} must have shape {tuple(wanted)}; reshape them")
    if likelihood == "categorical":  # p = e^{f_y} / sum_c e^{f_c}
        f, y = f[targets.reshape(-1) != ignore_index], targets[targets != ignore_index]
        return f.logsumexp(1) - f.gather(1, y[:, None])[:, 0]
    y = targets.double().reshape(f.shape)
    if likelihood == "bernoulli":  # p = e^{y f} / (1 + e^f)
        return (torch.logaddexp(f, torch.zeros_like(f)) - y * f).sum(1)
    if likelihood == "poisson":  # p = e^{y f} e^{-e^f} / y!
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum(1)
    return (((y - f) / sigma) ** 2 / 2 + math.log(sigma) + math.log(2 * math.pi) / 2).sum(1)


def negative_log_likelihood(
    outputs: Tensor, targets: Tensor, likelihood: str, *, sigma: float = 1.0, ignore_index: int = -100
) -> Tensor:
    r"""Return :math:`-\frac{1}{M} \sum_t \log p(y_t \mid f_t)` over the M terms, each summed over event dimensions.

    >>> logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    >>> negative_log_likelihood(logits, torch.tensor([1, -100]), "categorical").neg().exp()
    tensor(0.7500, dtype=torch.float64)
    """
    return _losses(outputs, targets, likelihood, sigma, ignore_index).mean()


def names(model: nn.Module) -> list[str]:
    """Return the qualified names of the trainable parameters in ``named_parameters()`` order, a shared one once.

    >>> names(nn.Sequential(nn.Linear(2, 1), nn.Tanh()))
    ['0.weight', '0.bias']
    """
    return [name for name, p in model.named_parameters() if p.requires_grad]


def flat_parameters(model: nn.Module) -> Tensor:
    """Return a float64 copy of the trainable parameters in one vector, ``[P]``.

    >>> flat_parameters(nn.LayerNorm(2))
    tensor([1., 1., 0., 0.], dtype=torch.float64)
    """
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters() if p.requires_grad])


def _forward(model: nn.Module, inputs: Any) -> tuple[Tensor, list[nn.Parameter]]:  # outputs, trainable parameters
    clone, keyed = copy.deepcopy(model).double(), isinstance(inputs, dict)
    given: dict[Any, Any] = inputs if keyed else dict(enumerate(inputs if isinstance(inputs, tuple) else (inputs,)))
    given = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in given.items()}
    with torch.enable_grad():
        outputs: Tensor = clone(**given) if keyed else clone(*given.values())
    return outputs, [p for p in clone.parameters() if p.requires_grad]


def _rows(values: Tensor, parameters: list[nn.Parameter]) -> Tensor:  # gradient of each value, [values.numel(), P]
    rows = [torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in values.reshape(-1)]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])


def jacobian(model: nn.Module, inputs: Any) -> Tensor:
    r"""Return :math:`J_{kp} = \partial f_k / \partial \theta_p`, ``[outputs.numel(), P]``, row by row.

    >>> jacobian(nn.Linear(2, 1), torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4., 1.]], dtype=torch.float64)
    """
    return _rows(*_forward(model, inputs))


def _hessian(f: Tensor, likelihood: str, sigma: float) -> Tensor:  # E_y[s s^T], s = d log p / d f, [D, D] from [D]
    if likelihood == "categorical":
        p, eye = f.softmax(0), torch.eye(len(f)).to(f)
        return torch.stack([p[y] * torch.outer(eye[y] - p, eye[y] - p) for y in range(len(f))]).sum(0)
    if likelihood == "bernoulli":
        p = f.sigmoid()
        return torch.diag(p * (1 - p) ** 2 + (1 - p) * (0 - p) ** 2)  # y = 1 and y = 0
    return torch.diag(f.exp() if likelihood == "poisson" else torch.full_like(f, 1 / sigma**2))


def _fisher(
    outputs: Tensor, parameters: list[nn.Parameter], targets: Tensor | None, likelihood: str, sigma: float, ignore: int
) -> Tensor:
    f = _terms(outputs.detach(), likelihood)
    J = _rows(outputs, parameters).reshape(*f.shape, -1)
    kept = [True] * len(f) if targets is None or likelihood != "categorical" else targets.reshape(-1) != ignore
    return torch.stack([J[t].T @ _hessian(f[t], likelihood, sigma) @ J[t] for t in range(len(f)) if kept[t]]).mean(0)


def fisher(
    model: nn.Module, inputs: Any, likelihood: str, *,
    sigma: float = 1.0, targets: Tensor | None = None, ignore_index: int = -100,  # targets are read for the mask only
) -> Tensor:  # fmt: skip
    r"""Return :math:`F = \frac{1}{M} \sum_t J_t^\top H_t J_t`, ``[P, P]``, with :math:`H_t = E_{y \sim p}[s s^\top]`.

    >>> fisher(nn.Linear(1, 1, bias=False), torch.tensor([[3.0]]), "gaussian", sigma=0.5)
    tensor([[36.]], dtype=torch.float64)
    """
    return _fisher(*_forward(model, inputs), targets, likelihood, sigma, ignore_index)


def score_fisher(
    model: nn.Module, inputs: Any, targets: Tensor, likelihood: str, *, sigma: float = 1.0, ignore_index: int = -100
) -> Tensor:
    r"""Return :math:`\frac{1}{M} \sum_t g_t g_t^\top`, ``[P, P]``, with g the gradient of each term's loss.

    >>> score_fisher(nn.PReLU(), torch.tensor([[-4.0]]), torch.tensor([[0.0]]), "gaussian")  # f = x / 4
    tensor([[16.]], dtype=torch.float64)
    """
    outputs, parameters = _forward(model, inputs)
    g = _rows(_losses(outputs, targets, likelihood, sigma, ignore_index), parameters)
    return g.T @ g / len(g)


def damped_inverse(fisher: Tensor, damping: float) -> Tensor:
    r"""Return :math:`(F + \gamma I)^{-1}`, ``[P, P]``.

    Raises:
        ValueError: damping <= 0.

    >>> damped_inverse(torch.diag(torch.tensor([1.0, 3.0])), 1.0).diagonal()
    tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    if damping <= 0:
        raise ValueError(f"damping={damping} must be > 0; use a small value such as 1e-3")
    return torch.inverse(fisher.double() + damping * torch.eye(len(fisher)).to(fisher).double())


def dense_q(family: str, lam: Lam, basis: Lam | None = None, *, shape: tuple[int, ...]) -> Tensor:
    r"""Return the matrix Q of one block, on the row-major vec of U, differentiable in ``lam``.

    With :math:`A = e^s`, :math:`D = \mathrm{diag}(c\, e^s)^2`, :math:`K_L = C_L L L^\top C_L^\top` and
    :math:`K_R = C_R R^\top R C_R^\top` (no C: identity; no c: ones):

    - kronecker, kfac: :math:`K_R \otimes K_L`; scaled_kronecker: :math:`A (K_R \otimes K_L) A`; dense: :math:`L L^\top`
    - eigen: :math:`(C_R \otimes C_L) D (C_R \otimes C_L)^\top`; diagonal: D; embedding: :math:`D \otimes K_L`

    Args:
        family: one of the above.
        lam: ``L [n, n]``, ``R [m, m]``, ``s [m, n]``; dense ``L [mn, mn]``; embedding ``s [m]``. Group dims lead.
            A long side is ``[blocks, size, size]``, block-diagonal, its padding dropped from K.
        basis: ``C_L``, ``C_R`` and ``c``, shaped like ``L``, ``R`` and ``s``.
        shape: of U, ``(m, n)`` or ``(groups, m, n)``: Q is then block-diagonal over groups.

    Raises:
        ValueError: an unknown family, missing or unknown tensors, or a shape of another length.

    >>> dense_q("diagonal", {"s": torch.tensor([[0.0, math.log(2.0)]])}, shape=(1, 2)).diagonal()
    tensor([1.0000, 4.0000], dtype=torch.float64)
    """
    _one_of("family", family, FAMILIES)
    basis = basis or {}
    if set(lam) != FAMILIES[family][0] or not set(basis) <= FAMILIES[family][1] or len(shape) not in (2, 3):
        what = f"lam={sorted(lam)}, basis={sorted(basis)}, shape={shape}"
        raise ValueError(f"{what}: {family!r} needs {FAMILIES[family]} and (m, n) or (groups, m, n); pass these")
    if len(shape) == 3:
        parts = [[{key: x[g] for key, x in tensors.items()} for tensors in (lam, basis)] for g in range(shape[0])]
        return block_diag(*(dense_q(family, *part, shape=shape[1:]) for part in parts))
    x = {key: value.double() for key, value in (*basis.items(), *lam.items())}
    x = {key: block_diag(*value) if value.ndim == 3 else value for key, value in x.items()}  # long sides
    m, n = shape

    def K(key: str, size: int) -> Tensor:
        half = x["L"] if key == "L" else x["R"].T
        half = x[f"C_{key}"] @ half if f"C_{key}" in x else half
        return (half @ half.T)[:size, :size]

    if family == "dense":
        return x["L"] @ x["L"].T
    if family in ("kronecker", "kfac"):
        return torch.kron(K("R", m), K("L", n))
    if family == "scaled_kronecker":
        A = torch.diag(x["s"].exp().reshape(-1))
        return A @ torch.kron(K("R", m), K("L", n)) @ A
    D = torch.diag((x["s"].exp() * x.get("c", 1.0)).reshape(-1) ** 2)
    if family in ("diagonal", "embedding"):
        return torch.kron(D, K("L", n)) if "L" in x else D
    rows, columns = x["s"].shape  # larger than (m, n) if s is padded
    C_R, C_L = x.get("C_R", torch.eye(rows).to(D)), x.get("C_L", torch.eye(columns).to(D))
    C = torch.kron(C_R[:m, :rows], C_L[:n, :columns])
    return C @ D @ C.T


def auxiliary_loss(fisher: Tensor, damping: float, q: Tensor, u: Tensor) -> Tensor:
    r"""Return the scalar :math:`A = \frac12 v^\top (F + \gamma I) v - u^\top v` at :math:`v = Q u`.

    >>> auxiliary_loss(torch.tensor([[3.0]]), 1.0, torch.tensor([[0.25]]), torch.tensor([1.0]))
    tensor(-0.1250, dtype=torch.float64)
    """
    v = q.double() @ u.double()
    return (v @ fisher.double() @ v + damping * (v @ v)) / 2 - u.double() @ v


def surrogate(fisher: Tensor, damping: float, q: Tensor, u: Tensor, preconditioned: bool) -> Tensor:
    r"""Return :math:`\langle w, Q u \rangle`, or :math:`\langle Q w, Q u \rangle` if preconditioned.

    :math:`w = (F + \gamma I) Q u - u` and Q w are constants: only the last Q is differentiated.

    >>> surrogate(torch.tensor([[3.0]]), 1.0, torch.tensor([[2.0]]), torch.tensor([1.0]), True)
    tensor(28., dtype=torch.float64)
    """
    q, u = q.double(), u.double()
    w = fisher.double() @ q @ u + damping * q @ u - u
    return (q @ w if preconditioned else w).detach() @ (q @ u)


def block_indices(model: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Return each block's positions in the flat vector, in the order of its packed U, and the shape of U.

    A Linear or ConvNd packs its weight and bias into ``[out, in + 1]``, with groups ``[groups, out, in + 1]`` (``in``
    counts the kernel) under the module's name, "(root)" for the model itself. A parameter elsewhere, or tied, or whose
    layer has a tied or frozen weight, stands alone as ``[1, P]`` or ``[shape[0], rest]``. Frozen ones are left out.

    >>> block_indices(nn.Linear(2, 2))
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
        weight, bias = (f"{prefix}.{key}" if prefix else key for key in ("weight", "bias"))
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and weight in untied:
            U = alone.pop(weight)
            U = U.reshape(getattr(module, "groups", 1), -1, U[0].numel())
            U = torch.cat([U, alone.pop(bias).reshape(*U.shape[:2], 1)], 2) if bias in untied else U
            packed[prefix or "(root)"] = U[0] if len(U) == 1 else U
    packed |= {name: x.reshape(len(x) if x.ndim > 1 else 1, -1) for name, x in alone.items()}
    return {name: (U.reshape(-1), tuple(U.shape)) for name, U in packed.items()}


def relative_update(family: str, lam: Lam, gradients: Lam, aux_lr: float) -> dict[str, Tensor]:
    r"""Return lambda after one relative step, from ``gradients`` :math:`\partial A / \partial \lambda`.

    With :math:`\bar G = G / \max(1, \lVert G \rVert_F)` per matrix: :math:`L \leftarrow L (I - \eta \bar G)` at
    :math:`G = L^\top \partial A / \partial L`, :math:`R \leftarrow (I - \eta \bar G) R` at
    :math:`G = (\partial A / \partial R) R^\top`, and s moves by :math:`-\eta` clamp(numel(s) dA/ds, -1, 1).

    >>> relative_update("dense", {"L": torch.tensor([[2.0]])}, {"L": torch.tensor([[0.25]])}, 0.2)
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
    """Return lambda and moments after Adam's bias-corrected update number ``step`` (1, 2, ...; no moments: zeros).

    >>> adam_update({"s": torch.ones(1)}, {"s": torch.ones(1)}, {}, 1, 0.25, (0.9, 0.999), 0.0)[0]
    {'s': tensor([0.7500], dtype=torch.float64)}
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
) -> StepResult:  # fmt: skip
    r"""Return one whole step: gradient, update of lambda if ``learn``, momentum, Q, step norm, parameters.

    :math:`m \leftarrow \beta m + (1 - \beta) g,\ p = Q m,\ \theta \leftarrow \theta - \eta (s(p) + wd\,\theta)`; rule
    "after": ``momentum`` is :math:`p \leftarrow \beta p + (1 - \beta) Q g`. ``step_norm``: None, "layer" (norm
    :math:`\sqrt{g \min(m, n)}` per block) or "kl" (rule "before"). ``aux_rule``: "relative" or "adam" (``moments``).
    ``curvature`` ``[P, P]`` stands in for the exact F, ``probe`` ``[P]`` for the gradient as u before its scaling.

    >>> model, one = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> blocks = {"(root)": Block("diagonal", {"s": torch.zeros(1, 1)})}
    >>> options = dict(lr=1.0, beta=0.0, weight_decay=0.0, damping=1.0, step_norm=None)  # solves it in one step
    >>> training_step(model, one, 5 * one, "gaussian", blocks, momentum=one[0], **options).theta
    tensor([5.], dtype=torch.float64)
    """
    _one_of("momentum_rule", momentum_rule, ("before", "after"))
    _one_of("step_norm", step_norm, (None, "layer", "kl") if momentum_rule == "before" else (None, "layer"))
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
        auxiliary, value = auxiliary_loss(F, damping, q, u).detach(), surrogate(F, damping, q, u, precondition_aux)
        for name, b in list(new.items()):
            slopes = torch.autograd.grad(value, list(b.lam.values()), retain_graph=True)
            slope, old = dict(zip(b.lam, slopes, strict=True)), (moments or {}).get(name, {})
            lam = relative_update(b.family, b.lam, slope, aux_lr)
            if aux_rule == "adam":
                lam, means[name] = adam_update(b.lam, slope, old, aux_step, aux_lr, aux_betas, aux_eps)
            new[name] = b._replace(lam=lam)
    q = _whole(new, layout).detach()
    m = beta * momentum.double() + (1 - beta) * (g if momentum_rule == "before" else q @ g)
    p = q @ m if momentum_rule == "before" else m
    s = p * (kl_clip / (lr**2 * (m @ p))).sqrt().clamp(max=1) if step_norm == "kl" else p.clone()
    for where, shape in layout.values() if step_norm == "layer" else ():
        norm = p[where].norm()
        s[where] = p[where] * math.sqrt(math.prod(shape[:-2]) * min(shape[-2:])) / norm if norm > 0 else 0.0
    return StepResult(loss.detach(), theta - lr * s - lr * weight_decay * theta, m, p, new, auxiliary, means)
