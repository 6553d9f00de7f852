"""Validation of what users pass; each error states value, requirement and remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn


def positive(name: str, value: float | Tensor, remedy: str = "use a positive number such as 1.0") -> None:
    """Raise ValueError unless every entry of ``value`` is finite and > 0."""
    tensor = torch.as_tensor(value)
    if not bool(((tensor > 0) & tensor.isfinite()).all()):
        raise ValueError(f"{name}={value} must be > 0 and finite; {remedy}")


def no_backward_hooks(model: nn.Module) -> None:
    """Raise RuntimeError if a module has backward hooks, which ``torch.func`` cannot run."""
    hooked = [
        path or type(m).__name__ for path, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks
    ]
    if hooked:
        raise RuntimeError(
            f"the modules {hooked} have full backward hooks, which torch.func cannot run; remove them to train "
            "with fishleg_func (forward hooks and forward pre-hooks may stay)"
        )


def one_process() -> None:
    """Raise RuntimeError where several processes train together: their Q would differ, and then their parameters."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        if world > 1:
            raise RuntimeError(
                f"{world} processes train together, and there must be one: Q is not shared between processes yet, and "
                "replicas would drift apart in silence; train on one device"
            )


def differentiable_by_func(error: RuntimeError) -> None:
    """Raise a RuntimeError with the remedy if ``error`` is torch.func's refusal of something inside of the model."""
    refused = ("saved tensor hooks", "setup_context", "does not require grad")
    if any(words in str(error) for words in refused):
        raise RuntimeError(
            "the model has hooks on saved tensors, calls torch.autograd in forward, or has a torch.autograd.Function "
            "without setup_context, none of which torch.func can differentiate, and must not in a step; use torch.func "
            "there"
        ) from error


Traits = dict[str, tuple[bool, torch.dtype, torch.device]]


def traits(model: nn.Module) -> Traits:
    """Return what a plan relies on, by parameter name: whether it is trained, its dtype and its device."""
    return {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}


def unchanged_model(model: nn.Module, then: Traits, layers: Mapping[str, nn.Module]) -> None:
    """Raise RuntimeError if parameters, ties, requires_grad, dtypes, devices or layers are not those of the plan."""
    now, modules = traits(model), dict(model.named_modules())
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    changed += [name for name, layer in layers.items() if layer is not model and modules.get(name) is not layer]
    if changed:
        raise RuntimeError(
            f"the model has changed since fishlegify: {changed} (module, tie, requires_grad, dtype or device) must "
            "stay; call remove() and fishlegify again"
        )


def plain_tables(tables: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if an embedding rewrites its weight in a forward pass, or has a gradient that is not dense."""
    remedies = {
        "max_norm": (None, "it rewrites the weight in every forward pass; bound the rows after a step"),
        "scale_grad_by_freq": (False, "it is not the gradient of a loss; Q divides by how often a row is used"),
        "sparse": (False, "Q takes dense gradients"),
    }
    for path, module in tables.items():
        for name, (plain, remedy) in remedies.items():
            if getattr(module, name) != plain:
                raise ValueError(
                    f"{name}={getattr(module, name)} of the embedding {path!r} must be {plain}: {remedy}; or leave it "
                    f"alone with exclude={path!r}"
                )


def digits_for(fisher: str, model: nn.Module) -> None:
    """Raise ValueError if finite differences are asked for of trained parameters that are too coarse for them."""
    coarse = {str(p.dtype) for p in model.parameters() if p.requires_grad and torch.finfo(p.dtype).bits < 32}
    if fisher == "antithetic" and coarse:
        raise ValueError(
            f"fisher='antithetic' needs parameters in float32 or float64, and some are {', '.join(sorted(coarse))}: "
            "their rounding swallows finite differences; use fisher='exact'"
        )


def kind(name: str, value: Any, kinds: type | tuple[type, ...], meant: str) -> None:
    """Raise TypeError unless ``value`` is of one of the types; a bool is no number."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be {meant}, and is of type {type(value).__name__}")


def number(name: str, value: float, low: float, high: float, remedy: str, *, low_open: bool = False) -> None:
    """Raise ValueError unless ``value`` is a number in [low, high), or (low, high) with ``low_open``."""
    kind(name, value, (int, float), "a number")
    if not (low < value < high or (value == low and not low_open)):
        bound = f"{'>' if low_open else '>='} {low:g}" + (f" and < {high:g}" if high != math.inf else " and finite")
        raise ValueError(f"{name}={value} must be {bound}; {remedy}")


def integer(name: str, value: int, low: int, remedy: str) -> None:
    """Raise ValueError unless ``value`` is an integer >= low."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer >= {low}; {remedy}")


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(repr(a) for a in allowed)}")


def in_range(name: str, values: Tensor, kept: Tensor, low: float, high: float, remedy: str) -> None:
    """Raise ValueError unless all ``values`` that are kept are in [low, high]; NaN is left to the check of the loss."""
    if bool((((values < low) | (values > high)) & kept).any()):
        seen = f"[{values[kept].min().item():g}, {values[kept].max().item():g}]"
        raise ValueError(f"{name} in {seen} must be in [{low:g}, {high:g}]; {remedy}")


def elementwise_targets(likelihood: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless targets have the shape of the outputs."""
    if outputs.ndim == 0 or targets.shape != outputs.shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} must have the shape {tuple(outputs.shape)} of the outputs, with "
            f"a first dimension of examples, for {likelihood}; reshape them, or use Categorical() for class labels"
        )


def broadcasts(name: str, shape: torch.Size, outputs: torch.Size) -> None:
    """Raise ValueError unless ``shape`` broadcasts against the shape of the outputs."""
    axes = zip(reversed(shape), reversed(outputs), strict=False)
    if len(shape) > len(outputs) or any(a not in (1, b) for a, b in axes):
        raise ValueError(
            f"{name} of shape {tuple(shape)} must broadcast against the outputs {tuple(outputs)}; reshape it"
        )


def targets_given(targets: Any) -> None:
    """Raise TypeError unless targets are a tensor."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets of type {type(targets).__name__} must be a tensor; use torch.as_tensor(targets)")


def class_labels(outputs: Tensor, targets: Tensor) -> None:
    """Raise unless targets are integers, one for each position of the outputs but the last dimension."""
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(
            f"targets of dtype {targets.dtype} must be integer class labels for Categorical; use targets.long(), or "
            "targets.argmax(-1) for one-hot labels"
        )
    if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} must have shape {tuple(outputs.shape[:-1])}, that of the outputs "
            f"{tuple(outputs.shape)} without the last dimension (classes), for Categorical; move the class dimension "
            "last, for instance with outputs.movedim(1, -1) in `output=`"
        )


def class_weights(weight: Any) -> None:
    """Raise unless ``weight`` is ``None`` or one number >= 0 per class, not all of them zero."""
    if weight is None:
        return
    if not (isinstance(weight, Tensor) and weight.dtype.is_floating_point):
        raise TypeError(
            f"weight={weight!r} must be a floating tensor with one entry per class; use torch.tensor([...])"
        )
    if weight.ndim != 1 or not bool(((weight >= 0) & weight.isfinite()).all()) or not bool((weight > 0).any()):
        raise ValueError(
            f"weight={weight} of shape {tuple(weight.shape)} must have shape [classes], entries >= 0 and finite, and "
            "one > 0; give a class that must not count the weight 0"
        )


def one_hot(targets: Tensor) -> None:
    """Raise ValueError unless each row of ``targets`` has one one and else zeros."""
    if not bool((((targets == 0) | (targets == 1)).all(-1) & (targets.sum(-1) == 1)).all()):
        raise ValueError(
            f"targets in [{targets.min().item():g}, {targets.max().item():g}] of shape {tuple(targets.shape)}, that of "
            "the outputs, must be one-hot: rows of zeros and one 1; the order is nll(outputs, targets), and mixed "
            "labels have no likelihood here"
        )


def tensor_output(outputs: Any) -> None:
    """Raise TypeError unless the model's output is one floating tensor."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}, and must return one tensor of natural parameters; pass "
            "output=, a function from what the model returns to that tensor, such as output=lambda o: o.logits"
        )
    if not outputs.dtype.is_floating_point:
        raise TypeError(f"the model returned dtype {outputs.dtype}, and must return a floating dtype")


def same_device(where: torch.device, tensors: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError unless all tensors are on ``where``; 0-d CPU tensors may be anywhere."""
    wrong = [f"{name} on {t.device}" for name, t in tensors if isinstance(t, Tensor) and t.device != where]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be on {where}, where the model is; move with .to({str(where)!r})")


def same_buffers(buffers: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError if the forward pass gave a buffer another shape or dtype."""
    wrong = [k for k, b in buffers.items() if (b.shape, b.dtype) != (new[k].shape, new[k].dtype)]
    if wrong:
        raise RuntimeError(
            f"the forward pass gave the buffers {wrong} another shape or dtype, and must keep both; nothing was "
            "changed. Keep such values in plain attributes, or allocate the buffer at its full size"
        )


def finite_step(loss: Tensor | None, checksum: Tensor, what: Callable[[], str]) -> None:
    """Raise FloatingPointError unless the loss, where it is known, and a checksum are finite."""
    *value, checked = torch.stack([x.double() for x in (loss, checksum) if x is not None]).tolist()  # read at once
    if not all(map(math.isfinite, value)):
        raise FloatingPointError(
            f"loss={value[0]} must be finite; nothing was changed. Look for NaN or Inf in inputs and targets, "
            "or for a batch whose targets are all masked, or lower lr"
        )
    if not math.isfinite(checked):
        at = "".join(f" at loss={x:g}" for x in value)
        raise FloatingPointError(
            f"{what()} is NaN or Inf{at} and must be finite; nothing was changed. Look for overflow in the backward "
            "pass (sqrt or log at 0, division by 0), lower lr, or raise damping"
        )


def tangent(v: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the entries of ``v`` name parameters and have their shapes."""
    unknown = sorted(set(v) - set(params))
    wrong = [
        f"{k}: {tuple(v[k].shape)} instead of {tuple(params[k].shape)}"
        for k in v
        if k in params and v[k].shape != params[k].shape
    ]
    if unknown or wrong or not v:
        raise ValueError(
            f"v has unknown names {unknown}, wrong shapes {wrong}, {len(v)} entries; it must be a non-empty dict of "
            f"tensors shaped like the parameters: {sorted(params)[:8]}{'...' if len(params) > 8 else ''}"
        )


def _same_kind(own: Any, given: Any) -> bool:
    """Tell whether both are tensors, or numbers of a type; formats that know tensors only keep these as 0-d ones."""
    if isinstance(own, Tensor):
        return isinstance(given, Tensor)
    if isinstance(given, Tensor):
        return given.ndim == 0 and given.is_floating_point() == isinstance(own, float)
    return isinstance(given, type(own))


def direction(v: Mapping[str, Any], shapes: Mapping[str, torch.Size], where: torch.device) -> None:
    """Raise unless ``v`` has a floating tensor for every parameter, of its shape, and no other."""
    missing, unknown = sorted(set(shapes) - set(v)), sorted(set(v) - set(shapes))
    for name in shapes.keys() & v.keys():
        kind(f"v[{name!r}]", v[name], Tensor, "a tensor")
    wrong = [f"{k}: {tuple(v[k].shape)} instead of {tuple(s)}" for k, s in shapes.items() if k in v and v[k].shape != s]
    if missing or unknown or wrong:
        raise ValueError(
            f"v lacks {missing}, has unknown {unknown} and wrong shapes {wrong}; it must have one tensor shaped like "
            "each parameter of the operator, see its attribute shapes"
        )
    for name, tensor in v.items():
        _floating(f"v[{name!r}]", tensor)
    same_device(where, [(f"v[{name!r}]", tensor) for name, tensor in v.items()])


def flat(v: Tensor, size: int, where: torch.device, *, columns: bool = True) -> None:
    """Raise unless ``v`` is a floating tensor ``[size]`` or, with ``columns``, ``[size, k]``."""
    if v.ndim not in ((1, 2) if columns else (1,)) or len(v) != size:
        allowed = f"({size},) or ({size}, k)" if columns else f"({size},)"
        raise ValueError(f"v of shape {tuple(v.shape)} must be of shape {allowed}, the entries in the order of names")
    _floating("v", v)
    same_device(where, [("v", v)])


def _floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} of dtype {tensor.dtype} must be of a floating dtype; use .to(torch.float32)")


def pair(batch: Any) -> tuple[Any, Any]:
    """Return a batch as ``(inputs, targets)``; raise TypeError unless it is a pair."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"a batch of type {type(batch).__name__} must be a pair (inputs, targets); several inputs go into a tuple "
            "or dict, and one batch without targets is [(inputs, None)]"
        )
    if batch[1] is not None:
        targets_given(batch[1])
    return batch[0], batch[1]


def same_state(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError unless two states have the same names and shapes."""
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    wrong_kind = [k for k in own if k in given and not _same_kind(own[k], given[k])]
    if wrong_kind:
        raise ValueError(f"the state has entries {wrong_kind} that are not what they must be: tensors, or numbers")
    both = [k for k in own if k in given and isinstance(own[k], Tensor)]
    wrong = [
        f"{k}: {tuple(given[k].shape)} instead of {tuple(own[k].shape)}" for k in both if given[k].shape != own[k].shape
    ]
    if missing or unknown or wrong:
        raise ValueError(
            f"the state lacks {missing}, has unknown {unknown} and wrong shapes {wrong}; it must come from a step made "
            "with the same model and arguments"
        )


def groups_agree(members: Mapping[str, list[int]], groups: list[dict[str, Any]]) -> None:
    """Raise ValueError where the parameters of one block are in groups with different betas or damping."""
    for name, numbers in members.items():
        of = [groups[i] for i in numbers]
        different = [key for key in ("betas", "damping") if any(g[key] != of[0][key] for g in of)]
        if different:
            raise ValueError(
                f"the parameters of {name!r} are in groups with different {', '.join(different)}, and must share them, "
                "as they share one Q; give these groups the same, or put the parameters into one group"
            )


def matches(pattern: str, names: Collection[str]) -> bool:
    """Tell whether a glob pattern matches one of ``names``, case-sensitively."""
    return any(fnmatchcase(name, pattern) for name in names)


def all_patterns_match(argument: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise ValueError, naming all offenders, unless every pattern matches a name."""
    unmatched = [p for p in patterns if not matches(p, names)]
    if unmatched:
        raise ValueError(
            f"{argument}: the patterns {unmatched} match no parameter or module and must match at least one; names "
            f"here: {sorted(names)[:12]}{'...' if len(names) > 12 else ''}"
        )


def group(values: Mapping[str, Any]) -> None:
    """Raise unless what a group of parameters holds is in its range; schedulers may set a rate of zero."""
    number("lr", float(values["lr"]), 0, math.inf, "use a small value such as 3e-2")
    if values["weight_decay"] is None:
        raise ValueError("weight_decay=None of a group must be a number >= 0; leave it out for the optimizer's own")
    number("weight_decay", float(values["weight_decay"]), 0, math.inf, "use 0 for none")
    if len(values["betas"]) != 1:
        raise ValueError(f"betas={values['betas']} must be one number, (beta,); use (0.9,)")
    number("beta", float(values["betas"][0]), 0, 1, "use 0.9, or 0 for no momentum")
    if values["damping"] is not None:
        number("damping", float(values["damping"]), 0, math.inf, "use None, or 1e-3", low_open=True)


def no_parallel_wrapper(model: nn.Module) -> None:
    """Raise TypeError for a module that only distributes another."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"the model is a {type(model).__name__}, and must be the module inside; pass model.module")


def gradient_was_seen(cotangent: Tensor | None) -> None:
    """Warn where the gradient at the outputs is not known, from which masks are told."""
    if cotangent is None:
        warnings.warn(
            "no gradient came by at the model's outputs, so Q takes no term of the loss for a masked one; let the loss "
            "be computed from the very tensor that the model, or output=, returns",
            stacklevel=4,
        )


def about(shapes: Mapping[str, torch.Size], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a model has the parameters that an operator is about."""
    wrong = [name for name, shape in shapes.items() if name not in params or params[name].shape != shape]
    if wrong:
        raise ValueError(
            f"an inverse about {wrong} must be about parameters of the model, which has {list(params)}; make it from "
            "this model, and detach masks before"
        )


def masks(given: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Raise unless every mask is a tensor of a parameter's name and shape."""
    for name, mask in given.items():
        kind(f"masks[{name!r}]", mask, Tensor, "a tensor, zero where a weight is removed")
    wrong = [f"{name} {tuple(m.shape)}" for name, m in given.items() if name not in shapes or m.shape != shapes[name]]
    if wrong:
        known = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"masks of {wrong} must have names and shapes of parameters: {known}")
