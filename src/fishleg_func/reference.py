r"""Dense float64 oracles for every quantity of FishLeg (Garcia et al., ICLR 2023): simple, obviously right, not fast.

They share no code with what they check, form every matrix, and run on a float64 copy of the model. Flat vectors hold
the ``P`` trainable parameters in the order of ``names``, row-major. Arguments mean the same everywhere:

- ``model``: any module, in the mode it is in; its parameters, buffers, mode and gradients never change.
- ``inputs``: a tensor, a tuple (positional) or a dict (keywords).
- ``likelihood``: "gaussian" (standard deviation ``sigma``), "bernoulli", "categorical" or "poisson".
- ``outputs``: natural parameters (mean, logit, log-rate) ``[N, ...]``, a term each, or logits of classes ``[..., C]``.
- ``targets``: shaped like ``outputs``; classes ``[...]`` for "categorical", where ``ignore_index`` is not a term.
- ``fisher``: F, ``[P, P]``. ``damping``: gamma > 0, in the units of F. ``q``: Q, ``[P, P]``. ``u``: probe, ``[P]``.

Example:
    The direction of FishLeg with an exact Q is the natural gradient, here that of least squares:

    >>> import torch
    >>> from fishleg_func import reference
    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
    >>> F = reference.fisher(model, x, "gaussian")
    >>> reference.damped_inverse(F, 0.5) @ torch.ones(2).double()
    tensor([1., 1.], dtype=torch.float64)
"""

from ._oracle_step import (
    Block,
    StepResult,
    adam_update,
    block_indices,
    flat_parameters,
    names,
    relative_update,
    training_step,
)
from ._oracle_step import Moments as Moments
from ._oracles import FAMILIES as FAMILIES
from ._oracles import Lam as Lam
from ._oracles import (
    auxiliary_loss,
    damped_inverse,
    dense_q,
    fisher,
    jacobian,
    level_leading,
    negative_log_likelihood,
    score_fisher,
    surrogate,
)

__all__ = [
    "Block",
    "StepResult",
    "adam_update",
    "auxiliary_loss",
    "block_indices",
    "damped_inverse",
    "dense_q",
    "fisher",
    "flat_parameters",
    "jacobian",
    "level_leading",
    "names",
    "negative_log_likelihood",
    "relative_update",
    "score_fisher",
    "surrogate",
    "training_step",
]
