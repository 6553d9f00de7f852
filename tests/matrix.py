"""Layer types and ways of training: what is checked of each pair, what fails and why, and the page that says so."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from cases import assert_close, flat, generator, randn, unflat
from layer_types import BATCH, CLASSES, LAYERS, Model
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.kernels import differentiable_kernels
from fishleg_func.likelihoods import Categorical

Inputs = tuple[Tensor, ...]
LABELS = torch.arange(BATCH) % CLASSES


def made(*names: str, dtype: torch.dtype = torch.float32) -> tuple[Model, Inputs]:
    """Return a model with these layers, always the same, and a batch."""
    inputs = [LAYERS[name].inputs(seed) for seed, name in enumerate(names)]
    return Model(*names).to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def distance(one: nn.Module, other: nn.Module, *, within: str = "") -> float:
    """Return the largest difference of parameters and buffers, of all names that begin with ``within``."""
    pairs = [(a, other.state_dict()[k]) for k, a in one.state_dict().items() if k.startswith(within)]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def take(optimizer: ff.FishLeg, model: nn.Module, inputs: Inputs, parts: int = 1, autocast: bool = False) -> float:
    """Take one step of a training loop in this many micro-batches, and return the loss of the last of them."""
    optimizer.zero_grad()
    loss = torch.zeros(())
    for xs, y in zip(zip(*(x.chunk(parts) for x in inputs), strict=True), LABELS.chunk(parts), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(*xs)
            loss = Categorical().nll(outputs, y)
        assert not autocast or outputs.dtype == torch.bfloat16
        (loss / parts).backward()
    optimizer.step()
    return loss.item()


# --- the ways ---


def eager(name: str, **options: Any) -> None:
    """Hold that ``fishlegify`` trains every parameter and the loss falls."""
    model, inputs = made(name)
    before = state(model)
    step = ff.fishlegify(model, Categorical(), lr=0.1, generator=generator(0), **options)
    losses = [step(inputs, LABELS).item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    still = {k for k, p in model.named_parameters() if torch.equal(p, before[k])}
    assert still == {k for k, p in model.named_parameters() if not p.requires_grad}


@functools.cache
def compiled(names: tuple[str, ...]) -> tuple[Model, Model]:
    """Return the models after a compiled and an eager first step, the one that has all that a step can have."""
    (model, inputs), (twin, _) = made(*names), made(*names)
    torch._dynamo.reset()
    step = ff.fishlegify(model, Categorical(), generator=generator(0))
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs, LABELS)
    torch.testing.assert_close(ff.fishlegify(twin, Categorical(), generator=generator(0))(inputs, LABELS), loss)
    return model, twin


def compile(name: str) -> None:
    """Hold that a compiled step is one graph, and that it does what an eager one does."""
    group = [k for k, v in LAYERS.items() if v.group == LAYERS[name].group and (k, "compile") not in NO]
    names = tuple(group) if name in group else (name,)
    body = f"bodies.{names.index(name)}."
    assert distance(*compiled(names), within=body) <= 1e-5
    assert distance(compiled(names)[0], made(*names)[0], within=body) > 1e-4  # it moved


def exact(name: str) -> None:
    """Hold that the exact Fisher product is that of the dense oracle."""
    model, inputs = made(name, dtype=torch.float64)
    fisher = reference.fisher(model, inputs, "categorical", targets=LABELS)
    v = randn(len(fisher), seed=1)
    product = ff.fisher_vector_product(model, Categorical(), inputs, unflat(model, v))
    assert_close(flat(model, product), fisher @ v, 1e-9)


def sampled(name: str) -> None:
    """Hold that the sampled Fisher product is symmetric and positive, and that Q learned from it trains."""
    model, inputs = made(name, dtype=torch.float64)
    u, v = (randn(len(reference.flat_parameters(model)), seed=i) for i in (1, 2))

    def product(vector: Tensor) -> Tensor:
        options: dict[str, Any] = {"kind": "sampled", "generator": generator(4)}
        return flat(model, ff.fisher_vector_product(model, Categorical(), inputs, unflat(model, vector), **options))

    torch.testing.assert_close(u @ product(v), v @ product(u))
    assert v @ product(v) > 0 and u @ product(u) > 0
    eager(name, fisher="sampled")


def accumulation(name: str) -> None:
    """Hold that four micro-batches are one large batch."""
    (whole, inputs), (parts, _) = made(name, dtype=torch.float64), made(name, dtype=torch.float64)
    one, four = (ff.FishLeg(m, Categorical(), generator=generator(0), update_aux_every=2) for m in (whole, parts))
    for _ in range(4):
        take(one, whole, inputs)
        take(four, parts, inputs, parts=4)
    assert distance(whole, made(name, dtype=torch.float64)[0]) > 1e-3  # they moved
    assert distance(whole, parts) <= 1e-6, "micro-batches differ from the large batch"


def kernels_for_bfloat16(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context without oneDNN's LSTM where that has none in bfloat16, for which torch would fail by itself."""
    has_one = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return nullcontext() if has_one else differentiable_kernels(model, twice=False)


def amp(name: str) -> None:
    """Hold that bfloat16 autocast trains to the loss of float32."""
    final = []
    for autocast in (False, True):
        model, inputs = made(name)
        start = Categorical().nll(model(*inputs), LABELS).item()
        optimizer = ff.FishLeg(model, Categorical(), lr=0.1, weight_decay=0.0, generator=generator(0))
        with kernels_for_bfloat16(model):
            for _ in range(15):
                take(optimizer, model, inputs, autocast=autocast)
        final.append(Categorical().nll(model(*inputs), LABELS).item())
    assert final[0] < 0.8 * start and abs(final[1] - final[0]) <= 0.05 * final[0], f"from {start}: {final}"


def resume(name: str) -> None:
    """Hold that a run that is stopped at a random step, saved and loaded goes on bit for bit."""
    at, steps = random.Random(name).randrange(1, 7), 8
    model, inputs = made(name)
    optimizer, saved = ff.FishLeg(model, Categorical(), generator=generator(0), update_aux_every=3), io.BytesIO()
    for i in range(steps):
        if i == at:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        take(optimizer, model, inputs)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    again = made(name)[0]
    assert distance(model, again) > 1e-3  # it moved
    resumed = ff.FishLeg(again, Categorical(), generator=generator(9), update_aux_every=3)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(at, steps):
        take(resumed, again, inputs)
    assert distance(model, again) == 0
    ends = (optimizer.fishleg.state_dict(), resumed.fishleg.state_dict())
    assert [k for k, t in ends[0].items() if not torch.equal(torch.as_tensor(t), torch.as_tensor(ends[1][k]))] == []


MODES: dict[str, Callable[[str], None]] = {
    f.__name__: f for f in (eager, compile, exact, sampled, accumulation, amp, resume)
}

# --- what does not work ---


@dataclass(frozen=True)
class Reason:
    """Why something does not work: the exception by which it is known, part of its message, and words for the page."""

    error: type[BaseException]
    message: str
    words: str


_UNTRACED = Reason(
    torch._dynamo.exc.Unsupported,
    "RNN",
    "torch does not compile `nn.RNN`, `nn.GRU` and `nn.LSTM`, with this library or without. Their cells compile.",
)
_COUPLED = Reason(
    AssertionError,
    "micro-batches differ",
    "In training mode BatchNorm normalizes by the statistics of its batch, and those of a micro-batch are others. So "
    "it is with any optimizer; in `eval()` mode they agree.",
)
_ITERATED = Reason(
    AssertionError,
    "micro-batches differ",
    "In training mode `spectral_norm` takes one step of a power iteration in every forward pass, and four "
    "micro-batches are four passes. So it is with any optimizer; in `eval()` mode they agree.",
)
NO: dict[tuple[str, str], Reason] = {
    **{(name, "compile"): _UNTRACED for name in ("RNN", "GRU", "LSTM")},
    ("BatchNorm1d, 2d, 3d", "accumulation"): _COUPLED,
    ("Linear with spectral_norm", "accumulation"): _ITERATED,
}


def works(check: Callable[[], None], reason: Reason | None) -> bool:
    """Return whether a check passes; one that fails for another reason than the known one raises."""
    try:
        check()
    except Exception as error:
        if reason is None or not isinstance(error, reason.error) or reason.message not in str(error):
            raise
        return False
    return True


@functools.cache
def outcome(name: str, mode: str) -> bool:
    """Return whether a layer type works in a mode, as found by trying."""
    return works(lambda: MODES[mode](name), NO.get((name, mode)))


# --- the page ---

HEAD = """# Layer types and ways of training

A test run makes this page, and fails where it is not what the run has found:

```bash
python -m pytest tests/test_matrix.py --matrix docs/matrix.md
```

Each layer type is in a model of its own, with a linear layer and a softmax over three classes behind it, and is trained
on one batch. What "yes" means:

- **eager**: in 15 steps of `fishlegify` the loss falls by 20 % or more, and all parameters that are not frozen move.
- **compile**: `torch.compile(step, fullgraph=True, backend="aot_eager")` makes one graph of the first step, which has
  all that a step can have, and it equals the eager one to 1e-5. Layers of a kind are compiled side by side.
- **exact**: `F v` is that of the dense float64 oracle to 1e-9.
- **sampled**: `F v` is symmetric and positive for one draw of labels, and with `fisher="sampled"` training goes as
  above.
- **accumulation**: four micro-batches before each step of `FishLeg` equal one large batch to 1e-6 in float64, over four
  steps.
- **amp**: under autocast in bfloat16, 15 steps of `FishLeg` lower the loss by 20 % or more, and to within 5 % of that
  of float32.
- **resume**: saved at a random step and loaded into new objects, training with `FishLeg` goes on bit for bit.

"""


def page(found: Callable[[str, str], bool]) -> str:
    """Return the page of the documentation.

    Args:
        found: Whether a layer type works in a mode.
    """
    missing = [(name, mode) for name in LAYERS for mode in MODES if not found(name, mode)]
    reasons = list(dict.fromkeys(NO[cell] for cell in missing))
    rows = [["layer", *MODES], ["---"] * (1 + len(MODES))]
    for name in LAYERS:
        cells = [f"no ({1 + reasons.index(NO[name, mode])})" if (name, mode) in missing else "yes" for mode in MODES]
        rows.append([name, *cells])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{HEAD}{table}\n" + "".join(f"{i}. {reason.words}\n" for i, reason in enumerate(reasons, 1))
