"""Likelihoods: negative log-likelihood, samples, and the Fisher of the outputs.

The model's outputs are the natural parameters of a likelihood p(y given f). A likelihood is a mean over *terms*
(examples, or unmasked tokens), each summed over its event dimensions. Four are built in; one's own needs only ``nll``
and ``sample``.
"""

from ._agreement import check_loss
from ._categorical import Categorical
from ._elementwise import Bernoulli, Gaussian, Poisson
from ._likelihood import Likelihood

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson", "check_loss"]
