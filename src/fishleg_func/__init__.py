"""FishLeg as a model transform: natural-gradient training with a learned inverse Fisher."""

from . import families, likelihoods, logs, pruning, reference
from ._types import Accuracy, Hyper, LowRank
from .checkpoints import save_checkpoint
from .conjugate import Solution
from .diagnostics import Report
from .entry import fishlegify
from .estimate import estimate_inverse_fisher
from .fisher import fisher_vector_product
from .fisher_operator import FisherOperator
from .influence import influence_scores, self_influence
from .inverse import Fit, InverseFisher
from .laplace import Laplace, Moments
from .layers import LayerSpec
from .optimizer import FishLeg
from .original_checkpoint import load_original_checkpoint
from .original_likelihoods import FISH_LIKELIHOODS
from .penalty import QuadraticPenalty
from .qmodules import QModule
from .registry import register_layer
from .step import FishLegStep

__version__ = "0.1.0"

__all__ = [
    "FISH_LIKELIHOODS",
    "Accuracy",
    "FishLeg",
    "FishLegStep",
    "FisherOperator",
    "Fit",
    "Hyper",
    "InverseFisher",
    "Laplace",
    "LayerSpec",
    "LowRank",
    "Moments",
    "QModule",
    "QuadraticPenalty",
    "Report",
    "Solution",
    "estimate_inverse_fisher",
    "families",
    "fisher_vector_product",
    "fishlegify",
    "influence_scores",
    "likelihoods",
    "load_original_checkpoint",
    "logs",
    "pruning",
    "reference",
    "register_layer",
    "save_checkpoint",
    "self_influence",
]
