"""Influence functions: what each training example did to the loss on each test example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from . import _checks
from ._resolve import as_likelihood
from .capture import kept_random_state
from .examplewise import gradient_rows, make_run, parameters_of
from .inverse import InverseFisher
from .likelihoods import Likelihood
from .transform import unwrapped

Output = Callable[[Any], Tensor]


def influence_scores(
    model: nn.Module,
    likelihood: Likelihood | Any,
    inverse: InverseFisher,
    train: Iterable[Any],
    test: Iterable[Any],
    *,
    output: Output | None = None,
) -> Tensor:
    r"""Return the influence of each training example on the loss of each test example.

    .. math:: S_{ti} = g_t^\top Q\, g_i, \qquad g = \nabla_\theta\,(-\log p)

    with each example's negative log-likelihood summed over its terms. Without example i the loss of t would be higher
    by about :math:`S_{ti} / N`, N being the number of terms of the training set (that of its examples, if each is one
    term): positive scores are of helpful examples, negative ones of harmful. The model is taken to be at a minimum of
    its training loss with the penalty :math:`\tfrac\gamma2 \|\theta\|^2`, γ being ``inverse.damping``.

    Args:
        model: Any module whose outputs for an example do not depend on the others: in eval mode if it has batch norms
            or dropout.
        likelihood: What its outputs are the natural parameters of.
        inverse: Q; the scores are about its parameters.
        train: Batches ``(inputs, targets)``, in a fixed order.
        test: Batches ``(inputs, targets)``, whose gradients are kept: P numbers for each example.
        output: From what the model returns to one tensor of natural parameters.

    Returns:
        S, ``[test examples, training examples]``, in the order of the batches.

    Raises:
        ValueError: If Q is not about parameters of the model, a loader shuffles, or has no batch.
        TypeError: If the likelihood or a batch is not one.

    Example:
        For :math:`f = \theta` at 0 under a unit Gaussian, :math:`g = -y`; here Q is the identity:

        >>> import torch
        >>> import fishleg_func as ff
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(2, 1)
        >>> model.weight.data.zero_()
        tensor([[0.]])
        >>> Q, train, test = ff.InverseFisher.for_model(model), [(x, torch.tensor([[2.0], [-3.0]]))], [(x[:1], x[:1])]
        >>> ff.influence_scores(model, ff.likelihoods.Gaussian(), Q, train, test)
        tensor([[ 2., -3.]])

    References:
        Koh & Liang, "Understanding black-box predictions via influence functions", ICML 2017.
    """
    rows = _rows(model, likelihood, inverse, output)
    with torch.no_grad(), kept_random_state(model):
        tests = inverse @ torch.cat(list(rows("test", test))).mT  # [P, test]
        return torch.cat([(g @ tests).mT for g in rows("train", train)], 1)


def self_influence(
    model: nn.Module,
    likelihood: Likelihood | Any,
    inverse: InverseFisher,
    batches: Iterable[Any],
    *,
    output: Output | None = None,
) -> Tensor:
    r"""Return the influence of each example on its own loss; mislabeled and unusual ones have the most.

    .. math:: S_{ii} = g_i^\top Q\, g_i

    Args:
        model: As in :func:`influence_scores`.
        likelihood: What its outputs are the natural parameters of.
        inverse: Q.
        batches: Batches ``(inputs, targets)``, in a fixed order.
        output: From what the model returns to one tensor of natural parameters.

    Returns:
        One score for each example, in the order of the batches.

    Raises:
        ValueError: If Q is not about parameters of the model, the loader shuffles, or has no batch.
        TypeError: If the likelihood or a batch is not one.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(2, 1)
        >>> model.weight.data.zero_()
        tensor([[0.]])
        >>> Q = ff.InverseFisher.for_model(model)
        >>> ff.self_influence(model, ff.likelihoods.Gaussian(), Q, [(x, torch.tensor([[2.0], [-3.0]]))])
        tensor([4., 9.])
    """
    rows = _rows(model, likelihood, inverse, output)
    with torch.no_grad(), kept_random_state(model):
        return torch.cat([inverse.quadratic(g.mT) for g in rows("batches", batches)])


def _rows(
    model: nn.Module, likelihood: Likelihood | Any, inverse: InverseFisher, output: Output | None
) -> Callable[[str, Iterable[Any]], Iterator[Tensor]]:
    """Return the map from batches to rows of gradients, some ``[k, P]`` at a time."""
    model, checked = unwrapped(model), as_likelihood(likelihood)
    params = parameters_of(model, inverse)
    run = make_run(model, output)

    def rows(argument: str, batches: Iterable[Any]) -> Iterator[Tensor]:
        if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
            raise ValueError(
                f"{argument}={batches!r} shuffles, and must not: scores are in the order of the examples; use "
                "DataLoader(..., shuffle=False)"
            )
        empty = True
        for batch in batches:
            empty = False
            inputs, targets = _checks.pair(batch)
            _checks.targets_given(targets)
            yield from gradient_rows(run, checked, params, inputs, targets)
        if empty:
            raise ValueError(f"{argument}={batches!r} must yield at least one batch (inputs, targets)")

    return rows
