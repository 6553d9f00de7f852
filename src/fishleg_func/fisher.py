r"""Fisher-vector products: exact, sampled, empirical and antithetic.

With J the Jacobian of the outputs, w the weights of the terms and H the Fisher of the outputs,
:math:`F = \sum_i w_i J_i^\top H_i J_i`. The first three kinds share one path: push a direction forward, apply a matrix
to each term of the result, pull it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from ._noise import Noise, new_noise
from ._resolve import as_likelihood
from ._types import Inputs, Linearization, Params
from .capture import call_model, cloned_buffers, find_ties, kept_random_state
from .kernels import differentiable_kernels
from .likelihoods import Likelihood
from .pushforward import pushforward_of

KINDS = ("exact", "sampled", "empirical", "antithetic")


def make_output_fisher(
    kind: str, likelihood: Likelihood, outputs: Tensor, weight: Tensor, targets: Tensor | None, noise: Noise
) -> Callable[[Tensor], Tensor]:
    r"""Return the map :math:`t \mapsto w \odot (M t)`, M the matrix of each term that the kind of product calls for.

    ``exact``: H. ``sampled``: :math:`zz^\top` with one draw of :math:`E[zz^\top] = H`. ``empirical``: :math:`ss^\top`
    with the score s at the targets; since :math:`g_i^\top v = s_i^\top (Jv)_i` this is the product with the mean of
    :math:`g_i g_i^\top`.

    Args:
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``.
        likelihood: The likelihood.
        outputs: Natural parameters.
        weight: Of each term in the mean, from :meth:`Likelihood.weight`.
        targets: Observations; needed for ``"empirical"`` only.
        noise: Source of the draws.
    """
    if kind == "exact":
        output_fisher = likelihood.make_fisher(outputs, noise)
        return lambda t: weight * output_fisher(t)
    if kind == "sampled":
        z = weight.sqrt() * likelihood.score(outputs, noise)
        return lambda t: z * likelihood.term_inner(z, t)
    weighted: Tensor = torch.func.grad(likelihood.nll)(outputs, targets)  # type: ignore[arg-type]
    return lambda t: weighted * likelihood.term_inner(weighted, t) / torch.where(weight > 0, weight, 1)


def linearize(
    model: nn.Module, inputs: Inputs, params: Params, output: Callable[[Any], Tensor] | None = None
) -> Linearization:
    """Linearize a model in its parameters, by name; nothing of the model is changed."""
    ties = find_ties(model)

    def run(params: Params) -> tuple[Tensor, Params]:
        buffers = cloned_buffers(model)
        replaced = {**params, **buffers}
        with differentiable_kernels(model, twice=True):
            out = call_model(model, replaced, inputs, ties)
        out = out if output is None else output(out)
        _checks.tensor_output(out)
        return out, {name: replaced[name] for name in buffers}

    outputs, vjp, buffers = torch.func.vjp(run, params, has_aux=True)  # type: ignore[misc]

    def pullback(c: Tensor) -> Params:
        pulled: Params = vjp(c)[0]
        return pulled

    return Linearization(outputs, pullback, pushforward_of(pullback, outputs), buffers, pullback)


def antithetic_product(gradient: Callable[[Params], Params], params: Params, v: Params) -> Params:
    r"""Return a central difference: :math:`(g(\theta + \epsilon v) - g(\theta - \epsilon v)) / 2\epsilon`.

    ε is set from the size of the parameters relative to v, so the product is linear in the scale of v and of the loss.

    Args:
        gradient: From parameters to the gradient of the negative log-likelihood at one fixed set of sampled targets.
        params: θ.
        v: Direction, for some or all of the parameters.
    """
    norm_v = torch.stack([t.square().sum() for t in v.values()]).sum().sqrt()
    norm_p = torch.stack([params[k].square().sum() for k in v]).sum().sqrt()
    relative = torch.finfo(norm_v.dtype).eps ** (1 / 3)
    epsilon = relative * (1 + norm_p) / norm_v.clamp(min=torch.finfo(norm_v.dtype).tiny)
    plus = gradient({k: p + epsilon * v[k] if k in v else p for k, p in params.items()})
    minus = gradient({k: p - epsilon * v[k] if k in v else p for k, p in params.items()})
    return {k: torch.where(norm_v > 0, (plus[k] - minus[k]) / (2 * epsilon), 0) for k in v}


def fisher_vector_product(
    model: nn.Module,
    likelihood: Likelihood | Any,
    inputs: Inputs,
    v: Params,
    *,
    kind: str = "exact",
    targets: Tensor | None = None,
    damping: float = 0.0,
    output: Callable[[Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    r"""Return :math:`(F + \gamma I)v` for the Fisher of a batch.

    .. math:: F = \mathbb{E}_x \mathbb{E}_{y \sim p(\cdot \mid f(x))} \nabla \log p \, \nabla \log p^\top
              = \mathbb{E}_x J^\top H J

    Parameters, buffers, gradients, hooks and the caller's random stream are as they were afterwards; dropout draws one
    mask for the whole product.

    Args:
        model: Any module, in the mode (train or eval) that it is in.
        likelihood: What the model's outputs are the natural parameters of.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.
        v: Direction, by qualified name, each entry shaped like its parameter. Parameters that are not named are held
            constant.
        kind: ``"exact"``, :math:`J^\top HJv`; ``"sampled"``, :math:`\text{mean}_i\, g_i (g_i^\top v)` with one random
            gradient of the model per term; ``"empirical"``, with those at ``targets``; ``"antithetic"``, central
            differences of the gradient at sampled targets. All but ``"empirical"`` have F as their expectation.
        targets: Observations. Needed for ``"empirical"``; elsewhere only their mask counts.
        damping: γ, in the units of F.
        output: From what the model returns to one tensor of natural parameters.
        generator: Source of the draws; by default the library's own, apart from the global stream and not reset by
            ``torch.manual_seed``.

    Returns:
        A dict like ``v``.

    Raises:
        ValueError: If ``kind`` is unknown, ``damping`` negative, ``v`` does not fit the parameters, or targets are
            missing.
        TypeError: If the likelihood has no ``nll`` and ``sample``, or the model does not return a tensor.

    Example:
        For a linear model with a Gaussian likelihood, :math:`F = E[xx^\top] / \sigma^2`:

        >>> import torch
        >>> from fishleg_func.likelihoods import Gaussian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> v = {"weight": torch.ones(1, 2)}
        >>> fisher_vector_product(model, Gaussian(), x, v, damping=1.0)["weight"].tolist()
        [[1.5, 5.5]]

    References:
        Garcia et al. (ICLR 2023), section 3, for its role in FishLeg; Schraudolph (2002) for products with
        :math:`J^\top HJ`.
    """
    likelihood = as_likelihood(likelihood)
    _checks.choice("kind", kind, KINDS)
    _checks.number("damping", damping, 0, float("inf"), "use 0 for the Fisher alone, or a small value such as 1e-3")
    params = {name: p.detach() for name, p in model.named_parameters()}
    _checks.tangent(v, params)
    if kind == "empirical" and targets is None:
        raise ValueError(
            "targets=None must be given for kind='empirical'; pass the observed targets, or use kind='exact'"
        )
    _checks.no_backward_hooks(model)
    noise = new_noise(next(iter(v.values())).device, generator)
    with torch.no_grad(), kept_random_state(model):
        if kind == "antithetic":
            gradient = make_sampled_gradient(model, likelihood, inputs, targets, params, output, noise)
            product = antithetic_product(gradient, params, v)
        else:
            lin = linearize(model, inputs, {k: params[k] for k in v}, output)
            if targets is not None:
                likelihood.check_shapes(lin.outputs, targets)
            weight = likelihood.weight(lin.outputs, targets)
            output_fisher = make_output_fisher(kind, likelihood, lin.outputs, weight, targets, noise)
            product = lin.pullback(output_fisher(lin.pushforward(v)))
        return {k: product[k] + damping * v[k] for k in v}


def make_sampled_gradient(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Inputs,
    targets: Tensor | None,
    params: Params,
    output: Callable[[Any], Tensor] | None,
    noise: Noise,
) -> Callable[[Params], Params]:
    r"""Sample targets once, and return :math:`\theta \mapsto g(\theta)`, the gradient there.

    Every pass starts from the same random state, so that all see the same dropout masks.

    Args:
        model: The model; nothing of it is changed.
        likelihood: Samples the targets.
        inputs: What the model is called with.
        targets: Observations, whose mask the sampled ones take over.
        params: Where to sample.
        output: From what the model returns to natural parameters.
        noise: Source of the targets.

    Returns:
        The gradient as a function of all parameters by name.

    Raises:
        RuntimeError: Inside ``torch.compile``, where the random state cannot be replayed.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "fisher='antithetic' replays the random state, which torch.compile cannot; use fisher='exact'"
        )

    ties = find_ties(model)

    def outputs_at(point: Params) -> Tensor:
        with kept_random_state(model), differentiable_kernels(model, twice=False):
            out = call_model(model, {**point, **cloned_buffers(model)}, inputs, ties)
            out = out if output is None else output(out)
        _checks.tensor_output(out)
        return out

    at_params = outputs_at(params)
    sampled = likelihood.masked(likelihood.sample(at_params, noise.generator()), targets)
    gradient: Callable[[Params], Params] = torch.func.grad(lambda p: likelihood.nll(outputs_at(p), sampled))
    return gradient
