"""The exact Fisher of a data set as a matrix-free linear operator, and systems with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks
from ._noise import Noise, new_noise
from ._resolve import as_likelihood
from ._types import Inputs, Linearization, Params
from ._widened import wide, widened
from .capture import kept_random_state
from .conjugate import Solution, conjugate_gradients
from .fisher import linearize, make_output_fisher
from .inverse import InverseFisher
from .likelihoods import Likelihood
from .nystrom import nystrom
from .operators import Operator
from .transform import low_rank, select, unwrapped

KINDS = ("exact", "sampled", "empirical")

Product = Callable[[Params], Params]


class _Part(NamedTuple):
    """One batch of the data set."""

    terms: float
    make_product: Callable[[], Product]


class FisherOperator(Operator):
    r"""The damped Fisher of a data set, known by its products.

    .. math:: F + \gamma I, \qquad F = \frac{1}{M} \sum_{t=1}^M J_t^\top H_t J_t

    over the M terms (examples, or unmasked tokens) of all batches together. The parameters are copied: the operator
    stays what it is while the model is trained on. Buffers, and parameters that it is not about, must stay where
    ``keep=False``. The model is run in the mode that it is in; dropout draws one mask for each batch. Where parameters
    are in bfloat16 or float16, the model is computed in float32 at their values, and stays what it is.

    Args:
        model: Any module.
        likelihood: What its outputs are the natural parameters of.
        batches: Pairs ``(inputs, targets)``, such as a ``DataLoader``, read once; targets may be ``None`` except with
            ``kind="empirical"``, and elsewhere only their mask counts.
        damping: γ, in the units of the Fisher; zero for the Fisher alone, which is singular as a rule.
        include: Glob patterns on parameter or module names: the operator is about these.
        exclude: Glob patterns: it is not about these.
        kind: ``"exact"``; ``"sampled"``, one random gradient for each term; or ``"empirical"``, the gradients at the
            targets; see :func:`fishleg_func.fisher_vector_product`.
        output: From what the model returns to one tensor of natural parameters.
        keep: Keep each batch linearized, which takes the memory of all its activations; if not, every product
            runs the model again.
        generator: Source of the draws; by default the library's own, apart from the global stream.

    Attributes:
        names: Qualified names of the parameters, in the order of the flat vectors, that of ``named_parameters()``.
        shapes: Shape of each, by name.
        shape: ``(P, P)``.
        damping: γ.

    Raises:
        ValueError: If an argument is out of its range, or there is no batch, or no term in any.
        TypeError: If the likelihood or a batch is not one.

    Example:
        For a linear model with a Gaussian likelihood, :math:`F = E[xx^\top]`:

        >>> import torch
        >>> import fishleg_func as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> op = ff.FisherOperator(model, ff.likelihoods.Gaussian(), [(x, None)], damping=1.0)
        >>> (op @ torch.ones(2)).tolist()
        [1.5, 5.5]
        >>> solution = op.solve(torch.tensor([1.5, 5.5]))
        >>> [round(x, 5) for x in solution.x.tolist()], solution.converged
        ([1.0, 1.0], True)
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | Any,
        batches: Iterable[Any],
        *,
        damping: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        kind: str = "exact",
        output: Callable[[Any], Tensor] | None = None,
        keep: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        _checks.choice("kind", kind, KINDS)
        _checks.number("damping", damping, 0, float("inf"), "use 0 for the Fisher alone, or a small value such as 1e-3")
        model, likelihood = unwrapped(model), as_likelihood(likelihood)
        _checks.no_backward_hooks(model)
        chosen, _ = select(model, include, exclude)
        self._params = {name: p.detach().to(wide(p.dtype), copy=True) for name, p in chosen.items()}
        super().__init__(self._params, damping)
        self._model, self._likelihood, self._kind, self._output = model, likelihood, kind, output
        noise = new_noise(self.device, generator)
        parts = [self._part(*_checks.pair(batch), noise.fork(i), keep) for i, batch in enumerate(batches)]
        self._parts = [part for part in parts if part.terms > 0]
        if not self._parts:
            raise ValueError(
                f"batches={batches!r} of {len(parts)} batches must hold at least one term that is not masked"
            )

    def _seed(self, seed: int) -> None:
        """Seed the global streams of the CPU and of the model's device, and no other device's."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    @torch.no_grad()
    def _part(self, inputs: Inputs, targets: Tensor | None, noise: Noise, keep: bool) -> _Part:
        if targets is None and self._kind == "empirical":
            raise ValueError(
                "targets=None must be given for kind='empirical'; pass the observed targets, or use kind='exact'"
            )

        def linearized() -> Linearization:
            with kept_random_state(self._model), widened(self._model):
                self._seed(int(noise.counter) & (2**62 - 1))  # the same dropout at every product
                return linearize(self._model, inputs, self._params, self._output)

        def product_of(lin: Linearization) -> Product:
            weight = self._likelihood.weight(lin.outputs, targets)
            output_fisher = make_output_fisher(self._kind, self._likelihood, lin.outputs, weight, targets, noise)
            return lambda v: lin.pullback(output_fisher(lin.pushforward(v)))

        lin = linearized()
        if targets is not None:
            self._likelihood.check_shapes(lin.outputs, targets)
        terms = self._likelihood.terms(lin.outputs, targets)
        if not keep:
            return _Part(terms, lambda: product_of(linearized()))
        product = product_of(lin)
        return _Part(terms, lambda: product)

    def _products(self, v: Params) -> Params:
        total = sum(part.terms for part in self._parts)
        result = {name: self.damping * t for name, t in v.items()}
        for part in self._parts:
            product = part.make_product()
            for i in range(len(v[self.names[0]])):
                for name, t in product({name: t[i] for name, t in v.items()}).items():
                    result[name][i] += (part.terms / total) * t
        return result

    def _damped(self, purpose: str) -> None:
        """Raise ValueError if there is no damping."""
        if self.damping == 0:
            raise ValueError(f"damping=0.0 must be > 0 to {purpose}: F is singular; use a small value such as 1e-3")

    @torch.no_grad()
    def inverse(self, rank: int, *, generator: torch.Generator | None = None) -> InverseFisher:
        r"""Return the inverse of a low-rank approximation of the Fisher, which knows how layers depend on each other.

        .. math:: Q = V \mathrm{diag}\Big(\frac{1}{\mu_i + \gamma}\Big) V^\top + \frac1\gamma (I - V V^\top),
                  \qquad V \mathrm{diag}(\mu) V^\top \approx F

        by the randomized Nystrom method, from ``rank`` products with the Fisher. It is the exact inverse where the
        rank is that of F. It keeps P times ``rank`` numbers, and takes five to six times that while it is made.

        Args:
            rank: Number of directions in which Q differs from :math:`I / \gamma`, from 1 to P.
            generator: Source of the draws; by default the library's own, apart from the global stream.

        Returns:
            An operator over the same parameters; a saved one is read back by ``InverseFisher.for_model(model, "joint",
            rank=rank)``.

        Raises:
            ValueError: If γ is zero, or the rank is out of its range.

        Example:
            :math:`F = \mathrm{diag}(0, 3)`, of rank one:

            >>> import torch
            >>> import fishleg_func as ff
            >>> model, x = torch.nn.Linear(2, 1, bias=False).double(), torch.tensor([[0.0, 3.0**0.5]]).double()
            >>> op = ff.FisherOperator(model, ff.likelihoods.Gaussian(), [(x, None)], damping=1.0)
            >>> [round(q, 6) for q in op.inverse(rank=1).diagonal()["weight"].flatten().tolist()]
            [1.0, 0.25]

        References:
            Frangella, Tropp & Udell (2023), "Randomized Nystrom preconditioning".
        """
        block, q = low_rank(self._params, rank)
        self._damped("invert")
        source = generator if generator is not None else new_noise(self.device).generator()
        like = torch.empty((), dtype=self.dtype, device=self.device)
        vectors, values = nystrom(lambda v: self @ v - self.damping * v, self.shape[0], rank, source, like)
        rest = values.new_zeros(1)  # across V, F counts as zero: what it is where it has no more rank
        q.place_(vectors, 1 / (torch.cat([values, rest]) + self.damping))
        return InverseFisher((block,), {block.name: q}, self._params, self.damping)

    @torch.no_grad()
    def solve(
        self,
        b: Tensor | Params,
        *,
        preconditioner: InverseFisher | None = None,
        tol: float = 1e-5,
        max_iterations: int = 1000,
    ) -> Solution:
        r"""Solve :math:`(F + \gamma I)x = b` by conjugate gradients.

        Args:
            b: A dict like the parameters, or a flat vector ``[P]``.
            preconditioner: An operator near the inverse, about the same parameters; ``None`` for none.
            tol: On the relative residual.
            max_iterations: Most products with the Fisher.

        Returns:
            A record with ``x``, of the kind of b and in float32 or wider, ``iterations``, ``residual`` and
            ``converged``.

        Raises:
            ValueError: If γ is zero, b does not fit, or the preconditioner is about other parameters.
        """
        _checks.number("tol", tol, 0, 1, "use 1e-5", low_open=True)
        _checks.integer("max_iterations", max_iterations, 1, "use 1000")
        self._damped("solve")
        if preconditioner is not None and preconditioner.shapes != self.shapes:
            raise ValueError(
                f"preconditioner about {list(preconditioner.shapes)} must be about {list(self.shapes)}, in this order "
                "and of the same shapes; use the same model, include and exclude"
            )
        if isinstance(b, Tensor):
            _checks.flat(b, self.shape[0], self.device, columns=False)
        flat = (b if isinstance(b, Tensor) else self.flatten(b)).to(self.dtype)
        x, iterations, residual = conjugate_gradients(
            lambda v: self @ v, flat, lambda r: r if preconditioner is None else preconditioner @ r, tol, max_iterations
        )
        result = x.to(wide(b.dtype)) if isinstance(b, Tensor) else self.unflatten(x)
        return Solution(result, iterations, residual, residual <= tol)
