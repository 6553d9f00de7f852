r"""Oracles of the losses and matrices of FishLeg, part of ``fishleg_func.reference``: dense and in float64."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
block_diag: Callable[..., Tensor] = torch.block_diag


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
    r"""Return the mean negative log-likelihood of the terms.

    .. math:: -\frac{1}{M} \sum_{t=1}^M \log p(y_t \mid f_t)

    Each of the M terms is summed over its event dimensions.

    Args:
        outputs: Natural parameters f (mean, logit, log-rate), ``[N, ...]`` with one term per row; for "categorical"
            the logits of C classes, ``[..., C]``, with one term per vector.
        targets: Observations y, shaped like ``outputs``; for "categorical" the classes, ``[...]``.
        likelihood: "gaussian", "bernoulli", "categorical" or "poisson".
        sigma: Standard deviation of "gaussian", > 0; the others do not read it.
        ignore_index: Class that marks what is not a term, for "categorical" only.

    Returns:
        The loss, ``[]``, float64.

    Example:
        >>> import math, torch
        >>> from fishleg_func import reference
        >>> logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
        >>> reference.negative_log_likelihood(logits, torch.tensor([1, -100]), "categorical").neg().exp()
        tensor(0.7500, dtype=torch.float64)
    """
    return _losses(outputs, targets, likelihood, sigma, ignore_index).mean()


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
    r"""Return the Jacobian of the outputs in the parameters, row by row.

    .. math:: J_{kp} = \partial f_k / \partial \theta_p

    Args:
        model: Any module, in the mode that it is in, with P trainable parameters; it is not changed.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.

    Returns:
        J, ``[outputs.numel(), P]``, float64.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> reference.jacobian(torch.nn.Linear(2, 1), torch.tensor([[3.0, 4.0]]))
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
    r"""Return the exact Fisher information matrix of the batch.

    .. math:: F = \frac{1}{M} \sum_{t=1}^M J_t^\top H_t J_t, \qquad H_t = E_{y \sim p(\cdot \mid f_t)}[s s^\top]

    s is the score :math:`\partial \log p / \partial f_t`, and :math:`J_t` the Jacobian of the term's outputs.

    Args:
        model: Any module, in the mode that it is in, with P trainable parameters; it is not changed.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.
        likelihood: "gaussian", "bernoulli", "categorical" or "poisson".
        sigma: Standard deviation of "gaussian", > 0; the others do not read it.
        targets: Classes, shaped like the outputs without their last dimension: for "categorical", they say which terms
            are left out. By default none is; the values have no other effect.
        ignore_index: Class that marks what is not a term.

    Returns:
        F, ``[P, P]``, float64.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> reference.fisher(model, torch.tensor([[3.0]]), "gaussian", sigma=0.5)
        tensor([[36.]], dtype=torch.float64)

    References:
        Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023.
    """
    return _fisher(*_forward(model, inputs), targets, likelihood, sigma, ignore_index)


def score_fisher(
    model: nn.Module, inputs: Any, targets: Tensor, likelihood: str, *, sigma: float = 1.0, ignore_index: int = -100
) -> Tensor:
    r"""Return the empirical Fisher matrix at given targets; F is its mean over targets drawn from the model.

    .. math:: \frac{1}{M} \sum_{t=1}^M g_t g_t^\top, \qquad g_t = -\partial \log p(y_t \mid f_t) / \partial \theta

    Args:
        model: Any module, in the mode that it is in, with P trainable parameters; it is not changed.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.
        targets: Observations, shaped like the outputs; for "categorical" the classes, without the last dimension.
        likelihood: "gaussian", "bernoulli", "categorical" or "poisson".
        sigma: Standard deviation of "gaussian", > 0; the others do not read it.
        ignore_index: Class that marks what is not a term, for "categorical" only.

    Returns:
        The matrix, ``[P, P]``, float64.

    Example:
        The slope of a PReLU starts at 1/4, so that f = x / 4 here:

        >>> import torch
        >>> from fishleg_func import reference
        >>> reference.score_fisher(torch.nn.PReLU(), torch.tensor([[-4.0]]), torch.tensor([[0.0]]), "gaussian")
        tensor([[16.]], dtype=torch.float64)
    """
    outputs, parameters = _forward(model, inputs)
    g = _rows(_losses(outputs, targets, likelihood, sigma, ignore_index), parameters)
    return g.T @ g / len(g)


def damped_inverse(fisher: Tensor, damping: float) -> Tensor:
    r"""Return the inverse that Q learns to approximate.

    .. math:: (F + \gamma I)^{-1}

    Args:
        fisher: F, ``[P, P]``.
        damping: :math:`\gamma` > 0, in the units of F.

    Returns:
        The inverse, ``[P, P]``, float64.

    Raises:
        ValueError: If ``damping`` is not positive.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> reference.damped_inverse(torch.diag(torch.tensor([1.0, 3.0])), 1.0).diagonal()
        tensor([0.5000, 0.2500], dtype=torch.float64)

    References:
        Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023.
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
        family: One of the above.
        lam: ``L [n, n]``, ``R [m, m]``, ``s [m, n]``; dense ``L [mn, mn]``; embedding ``s [m]``. Group dims lead.
            A long side is ``[blocks, size, size]``, block-diagonal, its padding dropped from K.
        basis: ``C_L``, ``C_R`` and ``c``, shaped like ``L``, ``R`` and ``s``.
        shape: Of U, ``(m, n)`` or ``(groups, m, n)``: Q is then block-diagonal over groups.

    Returns:
        Q, ``[mn, mn]`` or ``[groups mn, groups mn]``, float64.

    Raises:
        ValueError: If the family is unknown, tensors are missing or unknown, or ``shape`` has another length.

    Example:
        >>> import math, torch
        >>> from fishleg_func import reference
        >>> reference.dense_q("diagonal", {"s": torch.tensor([[0.0, math.log(2.0)]])}, shape=(1, 2)).diagonal()
        tensor([1.0000, 4.0000], dtype=torch.float64)

    References:
        Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023.
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
    r"""Return the auxiliary loss of Q at one probe, least where :math:`Q u = (F + \gamma I)^{-1} u`.

    .. math:: A = \tfrac12 v^\top (F + \gamma I) v - u^\top v, \qquad v = Q u

    Args:
        fisher: F, ``[P, P]``.
        damping: :math:`\gamma`, in the units of F.
        q: Q, ``[P, P]``; the loss is differentiable in it.
        u: Probe, ``[P]``.

    Returns:
        A, ``[]``, float64.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> reference.auxiliary_loss(torch.tensor([[3.0]]), 1.0, torch.tensor([[0.25]]), torch.tensor([1.0]))
        tensor(-0.1250, dtype=torch.float64)

    References:
        Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023.
    """
    v = q.double() @ u.double()
    return (v @ fisher.double() @ v + damping * (v @ v)) / 2 - u.double() @ v


def surrogate(
    fisher: Tensor, damping: float, q: Tensor, u: Tensor, preconditioned: bool, blocks: Sequence[Tensor] = ()
) -> Tensor:
    r"""Return the scalar whose gradient in the last Q is the one that lambda descends.

    .. math:: \langle w, Q u \rangle \ \text{or, preconditioned,}\ \langle Q w, Q u \rangle,
              \qquad w = (F + \gamma I) Q u - u

    w and Q w are constants: only the last Q is differentiated. The plain form then has the gradient of A. In blocks
    whose scale does not count, :math:`w = c\,(F + \gamma I) Q u - u` there, with c such that
    :math:`w \perp Q u`, and zero where no c > 0 does it.

    Args:
        fisher: F, ``[P, P]``.
        damping: :math:`\gamma`, in the units of F.
        q: Q, ``[P, P]``.
        u: Probe, ``[P]``.
        preconditioned: Whether Q is applied to w.
        blocks: Positions in u of the blocks whose scale does not count.

    Returns:
        The scalar, ``[]``, float64.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> reference.surrogate(torch.tensor([[3.0]]), 1.0, torch.tensor([[2.0]]), torch.tensor([1.0]), True)
        tensor(28., dtype=torch.float64)

    References:
        Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023.
    """
    q, u = q.double(), u.double()
    v = q @ u
    fv = fisher.double() @ v + damping * v
    w = fv - u
    for where in blocks:
        along, square = u[where] @ v[where], v[where] @ fv[where]
        w[where] = along / square * fv[where] - u[where] if square > 0 and along > 0 else 0.0
    return (q @ w if preconditioned else w).detach() @ (q @ u)


def level_leading(U: Tensor, rank: int) -> Tensor:
    r"""Return a matrix whose leading singular values are made as small as the least of them, with its old norm.

    Those below a hundredth of the largest stay, and do not count.

    Args:
        U: Shape ``[m, n]``, or ``[groups, m, n]``: each for itself.
        rank: How many singular values, at least one.

    Returns:
        The matrix, of the shape of U, float64.

    Example:
        >>> import torch
        >>> from fishleg_func import reference
        >>> reference.level_leading(torch.diag(torch.tensor([7.0, 1.0, 1.0, 1.0])), 2).diagonal()
        tensor([3.6056, 3.6056, 3.6056, 3.6056], dtype=torch.float64)
    """
    if U.ndim == 3:
        return torch.stack([level_leading(x, rank) for x in U])
    left, values, right = torch.linalg.svd(U.detach().double(), full_matrices=False)
    new = values.clone()
    large = values[:rank] > values[0] / 100
    new[:rank][large] = values[:rank][large].min() if large.any() else 0.0
    V: Tensor = left @ torch.diag(new) @ right
    return V * (values.norm() / new.norm()) if large.any() else V
