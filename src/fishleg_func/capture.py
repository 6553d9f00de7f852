"""Capture: forward hooks that record what layers see and add zero probes to what they return.

The gradient in a probe is the gradient at that layer's output, so one ``torch.func.vjp`` over probes gives δ without
forming a weight gradient. Hooks are inert outside of a step, and ``torch.compile`` traces all of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import _checks
from ._autocast import without_autocast
from ._recompute import without_recomputation
from ._types import Call, Inputs, Linearization, Params, Slot
from .kernels import differentiable_kernels
from .pushforward import Pushforward, Seen

Slots = dict[str, list[Slot]]
Keep = Callable[[tuple[Any, ...], dict[str, Any], Tensor], Tensor]


class StaleSlots(RuntimeError):
    """A layer was called more often, or returned another shape, than in the discovery pass."""


class _Record:
    """What the hooks see during one forward pass; without probes, a discovery pass."""

    def __init__(self, probes: Seen | None) -> None:
        self.probes = probes
        self.seen: Seen = {}
        self.slots: Slots = {}


class Capture:
    """The hooks on one model.

    Args:
        model: The model; its code and state are not touched.
        layers: The modules to hook, by block name.
        keep: From a call of a layer to what is kept of it, by block name; see :meth:`LayerSpec.keep`.
        output: From what the model returns to one tensor of natural parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        keep: Mapping[str, Keep],
        output: Callable[[Any], Tensor] | None,
    ) -> None:
        self.model = model
        self.output, self._keep = output, keep
        self._ties = find_ties(model)
        self._record: _Record | None = None
        self._slots: dict[Any, Slots] = {}
        self._handles = [m.register_forward_hook(_Hook(self, k), with_kwargs=True) for k, m in layers.items()]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def saw(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """Record a layer's call, and return its output with a probe added; ``None`` outside of a step.

        Args:
            name: The layer's block.
            args: What it was called with, by position.
            kwargs: What it was called with, by keyword.
            out: What it returned.

        Returns:
            What the layer's output becomes, or ``None`` to leave it.

        Raises:
            StaleSlots: If the discovery pass saw other calls.
        """
        record = self._record
        if record is None:
            return None
        if record.probes is None:
            record.slots.setdefault(name, []).append(Slot(out.shape, out.dtype, out.device))
            return None
        if name not in record.probes:
            return None
        probes, calls = record.probes[name], record.seen.setdefault(name, [])
        if len(calls) == len(probes) or probes[len(calls)].shape != out.shape:
            raise StaleSlots(
                f"layer {name!r} returned shape {tuple(out.shape)} at its call {len(calls) + 1}, and must return what "
                f"it did just before, in calls of shapes {[tuple(p.shape) for p in probes]}; let its calls depend on "
                "nothing but the inputs and the global random stream"
            )
        calls.append(self._keep[name](args, kwargs, out))
        return out + probes[len(calls) - 1]

    @contextlib.contextmanager
    def _recording(self, record: _Record) -> Iterator[None]:
        self._record = record
        try:
            yield
        finally:
            self._record = None

    def _forward(self, inputs: Inputs, replaced: Params) -> Tensor:
        out = call_model(self.model, replaced, inputs, self._ties)
        out = out if self.output is None else self.output(out)
        _checks.tensor_output(out)
        return out.to(torch.promote_types(out.dtype, torch.float32))  # likelihoods need the digits

    def key(self, inputs: Inputs) -> tuple[Any, ...]:
        """Return what the calls of layers may depend on: shapes and flags of the inputs, modes of modules."""
        leaves, structure = pytree.tree_flatten(inputs)
        kept = [tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves if isinstance(x, (Tensor, int, str))]
        return str(structure), repr(kept), tuple(m.training for m in self.model.modules())

    def discover(self, inputs: Inputs, *, anew: bool = False) -> Slots:
        """Return how often each layer is called on such inputs, and what it returns; changes nothing.

        In eager code this costs a forward pass for each new shape of inputs; in compiled code it is traced and drops
        out.

        Args:
            inputs: What the model is called with.
            anew: Whether to look again at inputs of a kind that was seen before.

        Returns:
            What each call of each layer returns, by block name.
        """
        if torch.compiler.is_compiling():
            return self._discover(inputs)
        key = self.key(inputs)
        if anew or key not in self._slots:
            with kept_random_state(self.model):
                self._slots[key] = self._discover(inputs)
        return self._slots[key]

    def _discover(self, inputs: Inputs) -> Slots:
        record = _Record(None)
        with self._recording(record), differentiable_kernels(self.model, twice=False):
            self._forward(inputs, cloned_buffers(self.model))
        return record.slots

    def linearize(self, inputs: Inputs, direct: Params, slots: Slots, *, twice: bool) -> tuple[Linearization, Seen]:
        """Run the model once and return its linearization in layer outputs and ``direct`` parameters.

        The pullback returns ``(deltas, gradients)``: gradients at the outputs of the hooked layers, by name, a list
        over calls, and gradients of the direct parameters. The pushforward takes a pair of the same structure.

        Args:
            inputs: What the model is called with.
            direct: Parameters that are differentiated as they are, by qualified name.
            slots: From :meth:`discover`; layers that are missing there are not probed.
            twice: Whether the pushforward will be used, which needs attention kernels with a second derivative.

        Returns:
            The linearization, and the inputs of the hooked layers by name, a list over calls.
        """
        probes = {name: [slot.zeros() for slot in calls] for name, calls in slots.items()}

        def run(probes: Seen, direct: Params) -> tuple[Tensor, Any]:
            record = _Record(probes)
            buffers = cloned_buffers(self.model)
            replaced = {**direct, **buffers}
            with self._recording(record), differentiable_kernels(self.model, twice=twice):
                outputs = self._forward(inputs, replaced)
            return outputs, (record.seen, {name: replaced[name] for name in buffers})

        outputs, pullback, (seen, buffers) = torch.func.vjp(run, probes, direct, has_aux=True)  # type: ignore[misc]
        pushforward = Pushforward(pullback, outputs)
        return Linearization(outputs, pullback, pushforward, buffers, pushforward.pull), seen


Ties = dict[str, tuple[str, ...]]


def find_ties(model: nn.Module) -> Ties:
    """Return the other names of parameters and buffers that several modules hold, by their first name.

    A module that is reached by two paths holds its tensors once. ``functional_call``'s own handling of ties counts them
    twice and then leaves the replacement in the module (torch 2.13), so it is told every name instead.

    Args:
        model: Any module.
    """
    names: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for local, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            names.setdefault(tensor, []).append(prefix + local)
    return {first: tuple(others) for first, *others in names.values() if others}


_running = [False]


def is_own_run() -> bool:
    """Tell whether the model is being run by this library, not by its user; eager only."""
    return _running[0]


@contextlib.contextmanager
def _own_run() -> Iterator[None]:
    if torch.compiler.is_compiling():
        yield
        return
    outer, _running[0] = _running[0], True
    try:
        with without_recomputation(), without_autocast():
            yield
    finally:
        _running[0] = outer


def call_model(model: nn.Module, replaced: Params, inputs: Inputs, ties: Ties) -> Any:
    """Call the model with some tensors replaced; those that it reassigns are put into ``replaced``.

    It gets copies of its inputs, which it may change: a step may call it more than once.

    Args:
        model: The model.
        replaced: By name.
        inputs: A tensor, positional or keyword arguments.
        ties: From :func:`find_ties`.

    Returns:
        What the model returns.
    """
    inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    args, kwargs = inputs if isinstance(inputs, Call) else Call.of(inputs)
    everywhere = replaced | {other: replaced[k] for k, others in ties.items() if k in replaced for other in others}
    with _own_run():
        out = torch.func.functional_call(model, everywhere, args, kwargs, tie_weights=False)
    replaced.update({name: everywhere[name] for name in replaced})
    return out


def cloned_buffers(model: nn.Module) -> Params:
    """Return copies of the buffers, for a forward pass that may update them."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


class _Hook:
    """A layer's forward hook; copies of the model (``copy.deepcopy``, ``pickle``) get an inert one.

    Args:
        capture: What it tells.
        name: The layer's block.
    """

    def __init__(self, capture: Capture, name: str) -> None:
        self.capture, self.name = capture, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """Tell the capture; what it returns replaces the layer's output."""
        return self.capture.saw(self.name, args, kwargs, out)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """Become an inert hook in a copy."""
        return inert_hook, ()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The inert hook."""


def inert_hook() -> Callable[..., None]:
    """Return the hook that stands in copies of a model for one of this library."""
    return _nothing


RandomState = dict[int, Tensor]
"""The global random streams: of each GPU that matters by number, of the CPU at -1."""


def random_state(model: nn.Module) -> RandomState:
    """Return where the global random streams are, on the CPU and wherever the model's parameters are; eager only."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return {-1: torch.get_rng_state(), **{i: torch.cuda.get_rng_state(i) for i in devices if i is not None}}


def set_random_state(state: RandomState) -> None:
    """Put the global random streams where they were at :func:`random_state`."""
    for device, value in state.items():
        if device < 0:
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)


@contextlib.contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Leave the global random streams as they were; eager only."""
    state = random_state(model)
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the global random streams back where they were if the block raises."""
    state = random_state(model)
    try:
        yield
    except BaseException:
        set_random_state(state)
        raise


Save = Callable[[Iterable[Tensor]], None]


@contextlib.contextmanager
def tensors_restored_on_error() -> Iterator[Save]:
    """Put tensors back if the block raises; in compiled code, which raises nothing, do nothing.

    Yields:
        A function to be told tensors, each before it is written to.
    """
    saved: dict[Tensor, Tensor] = {}

    def save(tensors: Iterable[Tensor]) -> None:
        if not torch.compiler.is_compiling():
            saved.update({t: t.detach().clone() for t in tensors if t not in saved})

    try:
        yield save
    except BaseException:
        for tensor, value in saved.items():
            tensor.copy_(value)
        raise
