"""The learned inverse Fisher as a linear operator."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from . import _checks
from ._noise import new_noise
from ._trees import dense
from ._types import Params
from .blocks import Block
from .operators import Operator
from .qmodules import QModule
from .transform import JOINT, Family, low_rank, make_plan, select, unwrapped


class Fit(NamedTuple):
    """How :func:`fishleg_func.estimate_inverse_fisher` came to its result.

    Attributes:
        updates: Auxiliary updates so far, those of resumed runs with them.
        accuracy: Readings of the accuracy meter, ``(updates, relative residual)``.
        stopped: Whether the tolerance was reached.
        state: What ``state=`` takes to go on.
    """

    updates: int
    accuracy: tuple[tuple[int, float], ...]
    stopped: bool
    state: dict[str, Any]


class InverseFisher(Operator):
    r"""The learned inverse Fisher, a positive-definite linear operator over named parameters.

    .. math:: Q = \mathrm{diag}(Q_1, \dots, Q_B) \approx (F + \gamma I)^{-1}

    one :math:`Q_b` for each block (layer). It is a snapshot: what it was taken from may train on. Come by one through
    ``step.inverse_fisher()`` or :func:`fishleg_func.estimate_inverse_fisher`; :meth:`for_model` makes an untrained one,
    to load a saved state into.

    Args:
        blocks: Which parameters share a Q.
        q: Q module of each block, by name; copied.
        params: The parameters in the order of the flat vectors; only looked at.
        damping: γ, in the units of the Fisher.

    Attributes:
        names: Qualified names of the parameters, in the order of the flat vectors, that of ``named_parameters()``.
        shapes: Shape of each, by name.
        shape: ``(P, P)``.
        damping: γ.
        q: Q module of each block, by name.
        fit: How it was fitted, for one from :func:`fishleg_func.estimate_inverse_fisher`, else ``None``.

    Example:
        >>> import torch
        >>> import fishleg_func as ff
        >>> op = ff.InverseFisher.for_model(torch.nn.Linear(2, 1), damping=1.0)  # Q = I
        >>> op @ torch.tensor([1.0, 2.0, 3.0])
        tensor([1., 2., 3.])
        >>> op.names, op.trace().item(), op.logdet().item()
        (('weight', 'bias'), 3.0, 0.0)
    """

    def __init__(self, blocks: Sequence[Block], q: Mapping[str, QModule], params: Params, damping: float) -> None:
        super().__init__(params, damping)
        self.blocks = tuple(blocks)
        self.q = {block.name: copy.deepcopy(q[block.name]) for block in blocks}
        self.fit: Fit | None = None
        self._renew()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        q: Family | Mapping[str, Family] = "kfac",
        *,
        rank: int | None = None,
        damping: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> Self:
        """Return the operator of a model as it is before any training of Q.

        Args:
            model: The model; only looked at.
            q: Q family, as in :func:`fishleg_func.fishlegify`.
            rank: With ``q="joint"``, that of a result of :meth:`fishleg_func.FisherOperator.inverse`; ``None`` for a
                dense matrix.
            damping: γ that it reports.
            include: Glob patterns of the parameters it is about.
            exclude: Glob patterns of parameters that it is not about.

        Returns:
            The operator, to load a state into.

        Raises:
            ValueError: If a family or pattern is unknown, or there is a rank and q is not joint, or it is out of range.
        """
        model = unwrapped(model)
        if rank is not None:
            if q != JOINT:
                raise ValueError(f"rank={rank} must be None for q={q!r}; use q='joint', the one that has a rank")
            params = {name: p.detach() for name, p in select(model, include, exclude)[0].items()}
            block, identity = low_rank(params, rank)
            return cls((block,), {block.name: identity}, params, damping)
        plan = make_plan(model, q, include, exclude)
        return cls(plan.blocks, plan.q, covered(model, plan.blocks), damping)

    @torch.no_grad()
    def _renew(self) -> None:
        """Compute what Q is applied with anew."""
        self._operators = {name: tuple(t.detach() for t in q.operator()) for name, q in self.q.items()}

    def _products(self, v: Params) -> Params:
        product: Params = {}
        for block in self.blocks:
            u = self.q[block.name].act(self._operators[block.name], torch.func.vmap(block.pack)(v))
            product |= self._unpacked(block, dense(u))
        return product

    @torch.no_grad()
    def diagonal(self) -> Params:
        """Return the diagonal of Q; ``op.flatten(op.diagonal())`` is the flat one.

        Returns:
            By name, shaped like the parameters.
        """
        by_name: Params = {}
        for block in self.blocks:
            by_name |= self._unpacked(block, self.q[block.name].diagonal().unsqueeze(0))
        return {name: by_name[name].squeeze(0) for name in self.names}

    @torch.no_grad()
    def trace(self) -> Tensor:
        """Return the trace of Q.

        Returns:
            A 0-d tensor, float64.
        """
        return torch.stack([q.diagonal().sum(dtype=torch.float64) for q in self.q.values()]).sum()

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant of Q.

        Returns:
            A 0-d tensor, float64.
        """
        return torch.stack([q.logdet().double() for q in self.q.values()]).sum()

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None, n: int | None = None) -> Params:
        """Draw from N(0, Q).

        Args:
            generator: Source of the draws; by default the library's own, apart from the global stream.
            n: Number of draws; ``None`` for one.

        Returns:
            By name, shaped like the parameters, with a first axis of n draws where n is given.

        Raises:
            ValueError: If n < 1.
        """
        if n is not None:
            _checks.integer("n", n, 1, "use None for one draw")
        source = generator if generator is not None else new_noise(self.device).generator()
        drawn: Params = {}
        for block in self.blocks:
            q = self.q[block.name]
            like = next(q.parameters())
            z = torch.randn(n or 1, *q.shape, generator=source, dtype=like.dtype, device=like.device)
            drawn |= self._unpacked(block, q.sqrt(z))
        return {name: drawn[name] if n is not None else drawn[name].squeeze(0) for name in self.names}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> InverseFisher:
        """Return a copy in another dtype, on another device.

        Args:
            dtype: Floating; ``None`` keeps it.
            device: ``None`` keeps it.

        Returns:
            The copy.
        """
        q = {name: copy.deepcopy(module).to(device=device, dtype=dtype) for name, module in self.q.items()}
        block_of = {name: block.name for block in self.blocks for name in block.names.values()}
        kinds = {name: next(q[block_of[name]].parameters()) for name in self.names}
        params = {name: torch.empty(self.shapes[name], dtype=p.dtype, device=p.device) for name, p in kinds.items()}
        blocks = [replace(block, dtype=next(q[block.name].parameters()).dtype) for block in self.blocks]
        moved = InverseFisher(blocks, q, params, self.damping)
        moved.fit = self.fit
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all tensors by name, and the damping; ``torch.load(..., weights_only=True)`` reads it.

        Returns:
            What :meth:`load_state_dict` takes.
        """
        return {**{k: t.detach().clone() for k, t in self._tensors().items()}, "damping": self.damping}

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": t for name, q in self.q.items() for key, t in q.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: From an operator of the same model and families.

        Raises:
            ValueError: If names or shapes differ; nothing is changed.
        """
        own = self._tensors()
        _checks.same_state({**own, "damping": self.damping}, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.damping = float(state["damping"])
        self._renew()


def covered(model: nn.Module, blocks: Sequence[Block]) -> Params:
    """Return the parameters that blocks cover, in the order of ``named_parameters()``."""
    names = {name for block in blocks for name in block.names.values()}
    return {name: p.detach() for name, p in model.named_parameters() if name in names}
