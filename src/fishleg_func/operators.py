"""Symmetric linear operators over a model's named parameters: one interface for Q and for the Fisher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from . import _checks
from ._types import Params
from .blocks import Block

_DENSE_LIMIT = 10_000  # parameters; a float64 matrix of that size takes 800 MB


class Operator(ABC):
    """A symmetric matrix over named parameters, known by its products.

    Flat vectors hold the parameters one after the other in the order of ``names``, each row-major; that is the order of
    ``model.named_parameters()``.

    Args:
        params: The parameters by name, in that order; only shapes, dtypes and devices are looked at.
        damping: γ, in the units of the Fisher.

    Attributes:
        names: Qualified names of the parameters, in the order of the flat vectors.
        shapes: Shape of each, by name.
        shape: ``(P, P)``, P being the number of entries of all parameters.
        damping: γ.
    """

    def __init__(self, params: Params, damping: float) -> None:
        self.names = tuple(params)
        self.shapes = {name: p.shape for name, p in params.items()}
        self._sizes = [p.numel() for p in params.values()]
        self.shape = (sum(self._sizes), sum(self._sizes))
        self.damping = damping
        self._set_kind(params)

    def _set_kind(self, params: Mapping[str, Tensor]) -> None:
        """Take over dtypes and the device of what the operator is made of."""
        self._dtypes = {name: torch.promote_types(params[name].dtype, torch.float32) for name in self.names}
        self.dtype = max(self._dtypes.values(), key=lambda d: torch.finfo(d).bits)
        self.device = params[self.names[0]].device

    def _unpacked(self, block: Block, u: Tensor) -> Params:
        """Unpack ``[k, *packed shape]`` to parameters ``[k, *shape]``."""
        like = {name: torch.empty(self.shapes[name], device="meta") for name in block.names.values()}
        unpacked: Params = torch.func.vmap(lambda x: block.unpack(x, like))(u)
        return unpacked

    @abstractmethod
    def _products(self, v: Params) -> Params:
        """Multiply k directions at once: each entry ``[k, *shape]``, in float32 or wider."""

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Params) -> Params: ...
    @torch.no_grad()
    def __matmul__(self, v: Tensor | Params) -> Tensor | Params:
        """Multiply a dict like the parameters, a flat vector ``[P]``, or columns ``[P, k]``.

        Computed in float32, or wider where a parameter is, and returned in the dtype of ``v``.

        Args:
            v: What to multiply.

        Returns:
            The product, of the same kind and shape.

        Raises:
            ValueError: If names, shapes or devices are not those of the operator.
            TypeError: If v is no tensor or dict of floating tensors.
        """
        if isinstance(v, Mapping):
            product = self._products({name: t.unsqueeze(0) for name, t in self._taken(v).items()})
            return {name: product[name].squeeze(0).to(v[name].dtype) for name in self.names}
        _checks.kind("v", v, Tensor, "a dict like the parameters, a flat tensor [P], or columns [P, k]")
        _checks.flat(v, self.shape[0], self.device)
        columns = v.mT if v.ndim == 2 else v.unsqueeze(0)
        product = self._products(self._split(columns))
        rows = self._join(product, v.dtype)
        return rows.mT if v.ndim == 2 else rows.squeeze(0)

    def _taken(self, v: Params) -> Params:
        """Return a direction by name, checked, in the dtypes that products are computed in."""
        _checks.direction(v, self.shapes, self.device)
        return {name: v[name].detach().to(self._dtypes[name]) for name in self.names}

    def _split(self, rows: Tensor) -> Params:
        """Cut flat rows ``[k, P]`` into parameters ``[k, *shape]``."""
        pieces = torch.split(rows.detach(), self._sizes, dim=-1)
        return {
            name: piece.reshape(-1, *self.shapes[name]).to(self._dtypes[name])
            for name, piece in zip(self.names, pieces, strict=True)
        }

    def _join(self, v: Params, dtype: torch.dtype) -> Tensor:
        """Undo :meth:`_split`."""
        return torch.cat([v[name].flatten(1).to(dtype) for name in self.names], dim=1)

    def flatten(self, v: Params) -> Tensor:
        """Return a dict like the parameters as a flat vector.

        Args:
            v: By name.

        Returns:
            Shape ``[P]``.

        Raises:
            ValueError: If names, shapes or devices are not those of the operator.
        """
        return self._join({name: t.unsqueeze(0) for name, t in self._taken(v).items()}, self.dtype).squeeze(0)

    def unflatten(self, v: Tensor) -> Params:
        """Return a flat vector as a dict like the parameters.

        Args:
            v: Shape ``[P]``.

        Returns:
            By name.

        Raises:
            ValueError: If the length or device is not that of the operator.
        """
        _checks.flat(v, self.shape[0], self.device)
        return {name: t.squeeze(0) for name, t in self._split(v.reshape(1, -1)).items()}

    @torch.no_grad()
    def quadratic(self, v: Tensor | Params) -> Tensor:
        r"""Return :math:`v^\top A v`, A being the operator.

        Args:
            v: A dict like the parameters, a flat vector, or columns ``[P, k]``.

        Returns:
            A 0-d tensor; for columns, ``[k]``.
        """
        flat = self.flatten(v) if isinstance(v, Mapping) else v
        product: Tensor = self @ flat
        return (flat * product).sum(0)

    def dense(self) -> Tensor:
        """Return the matrix, for small models.

        Returns:
            Shape ``[P, P]``, in the flat order.

        Raises:
            ValueError: If there are more than 10,000 entries.
        """
        if self.shape[0] > _DENSE_LIMIT:
            raise ValueError(
                f"dense() of {self.shape[0]} parameters must be of <= {_DENSE_LIMIT}; use products, to_scipy(), or "
                "include= to choose parameters"
            )
        matrix: Tensor = self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return (matrix + matrix.mT) / 2  # symmetric to the last bit

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``, which works on numpy arrays; scipy must be installed.

        Returns:
            The operator, with products of vectors and of matrices, in float32 or wider.
        """
        from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped,unused-ignore]

        def multiply(x: Any) -> Any:
            product: Tensor = self @ torch.tensor(x.copy(), dtype=self.dtype, device=self.device)
            return product.cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=multiply, matmat=multiply, rmatvec=multiply, rmatmat=multiply, dtype=dtype
        )

    def __repr__(self) -> str:
        """Say what it is."""
        return f"{type(self).__name__}(shape={self.shape}, parameters={len(self.names)}, damping={self.damping:.3g})"
