"""``estimate_inverse_fisher``: Q of a model that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .entry import fishlegify
from .feed import Feed
from .inverse import Fit, InverseFisher
from .likelihoods import Likelihood
from .step import FishLegStep
from .transform import Family

_METER_PROBES = 8


def estimate_inverse_fisher(
    model: nn.Module,
    likelihood: Likelihood | Any,
    loader: Iterable[Any],
    *,
    damping: float,
    updates: int = 1000,
    q: Family | Mapping[str, Family] = "kfac",
    u: str = "gaussian",
    fisher: str = "exact",
    aux_lr: float = 0.5,
    tolerance: float | None = None,
    check_every: int = 100,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
    state: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> InverseFisher:
    r"""Learn the inverse Fisher of a model, whose parameters stay as they are.

    .. math:: Q = \arg\min_{Q(\lambda)} \; \mathbb{E}_u \big[ \tfrac12 u^\top Q (F + \gamma I) Q u - u^\top Q u \big]
              \approx (F + \gamma I)^{-1}

    The rate falls linearly to zero over the updates, so that the noise of the probes averages out. Families that have
    no statistics of the Fisher to start from start at :math:`I / \gamma`.

    Args:
        model: Any module, in the mode (train or eval) that it is in.
        likelihood: What its outputs are the natural parameters of.
        loader: Pairs ``(inputs, targets)``, or dicts of keyword arguments, such as a ``DataLoader`` gives: one for each
            update, again from the start when it is exhausted. The first is also what accuracy is read on. Targets may
            be ``None`` where nothing needs them.
        damping: γ, in the units of the Fisher.
        updates: Auxiliary updates in all, those in ``state`` with them.
        q: Q family, as in :func:`fishlegify`; ``"joint"`` for the whole inverse, of small models.
        u: Probe direction: ``"gaussian"``, for all of the inverse; or ``"gradient"``, for what gradients see.
        fisher: Fisher-vector product, as in :func:`fishlegify`.
        aux_lr: Rate at the first update, in (0, 1).
        tolerance: Stop where the relative residual :math:`\|(F + \gamma I)Qu - u\| / \|u\|` on fresh probes is at most
            this; ``None`` reads the meter for the record only.
        check_every: Updates between readings.
        include: Glob patterns on parameter or module names: Q is about these.
        exclude: Glob patterns: Q is not about these.
        output: From what the model returns to one tensor of natural parameters.
        progress: Show a progress bar; rich must be installed.
        state: ``fit.state`` of an earlier result with the same model and arguments, to go on from; the loader
            begins anew.
        generator: Seeds the random numbers.

    Returns:
        The inverse; its attribute ``fit`` says how it was come by.

    Raises:
        TypeError: If the model, the likelihood or a batch is not one.
        ValueError: If an argument is out of its range, or the loader is empty or yields only once.
        FloatingPointError: If a gradient or statistic is not finite.

    Example:
        The Fisher of a linear model under a unit Gaussian is that of its inputs, here 3:

        >>> import torch
        >>> import fishleg_func as ff
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.full((4, 1), 3.0**0.5)
        >>> op = ff.estimate_inverse_fisher(
        ...     model, ff.likelihoods.Gaussian(), [(x, None)], damping=1.0, q="joint", updates=50
        ... )
        >>> round(op.dense().item(), 4)  # 1 / (3 + 1)
        0.25

    References:
        Garcia et al. (ICLR 2023), section 3; McGowan et al., "Efficient model compression techniques with FishLeg",
        arXiv 2412.02328, for Q of a model that is not trained.
    """
    _checks.integer("updates", updates, 1, "use about 1000")
    _checks.integer("check_every", check_every, 1, "use 100")
    _checks.number("damping", damping, 0, float("inf"), "use a small value such as 1e-3", low_open=True)
    _checks.choice("u", u, ("gaussian", "gradient"))
    if tolerance is not None:
        _checks.number("tolerance", tolerance, 0, float("inf"), "use None never to stop early")
    with fishlegify(
        model, likelihood, damping=damping, q=q, u=u, fisher=fisher, aux_lr=aux_lr, step_norm=None,
        include=include, exclude=exclude, output=output, generator=generator,
    ) as step:  # fmt: skip
        done = _begin(step, damping, state, updates)
        with _bar(progress, updates, done) as report:
            done, accuracy, stopped = _run(step, Feed(loader), done, updates, aux_lr, tolerance, check_every, report)
        op = step.inverse_fisher()
        op.fit = Fit(done, tuple(accuracy), stopped, {"step": step.state_dict(), "updates": done})
    return op


def _begin(step: FishLegStep, damping: float, state: Mapping[str, Any] | None, updates: int) -> int:
    """Put Q where it starts, and return the number of updates that it has behind it."""
    if state is None:
        for module in step.q.values():
            if not module.has_basis:
                module.scale_(1 / damping)
        return 0
    learned = float(state["step"]["hyper.damping"])
    if not math.isclose(learned, damping, rel_tol=1e-6):
        raise ValueError(f"damping={damping} must be {learned:g}, with which state was learned; begin without state")
    step.load_state_dict(state["step"])
    if state["updates"] >= updates:
        raise ValueError(f"updates={updates} must be > {state['updates']}, those that state has behind it; raise it")
    return int(state["updates"])


def _run(
    step: FishLegStep,
    feed: Feed,
    done: int,
    updates: int,
    aux_lr: float,
    tolerance: float | None,
    check_every: int,
    report: Callable[[int, float | None], None],
) -> tuple[int, list[tuple[int, float]], bool]:
    """Make the updates, and return how many there are now, the readings, and whether the tolerance was reached."""
    accuracy: list[tuple[int, float]] = []
    metered: Any = None
    while done < updates:
        inputs, targets = feed.next()
        metered = inputs if metered is None else metered
        step.hyper.aux_lr.fill_(aux_lr * (1 - done / updates))
        step.update_aux(inputs, targets)
        feed.used()
        done += 1
        if done % check_every == 0 or done == updates:
            accuracy.append((done, step.accuracy(metered, _METER_PROBES).overall))
            if tolerance is not None and accuracy[-1][1] <= tolerance:
                return done, accuracy, True
        report(done, accuracy[-1][1] if accuracy else None)
    return done, accuracy, False


def _bar(progress: bool, updates: int, done: int) -> AbstractContextManager[Callable[[int, float | None], None]]:
    """Return a context whose value shows ``(updates so far, last reading)``, or does nothing."""
    if not progress:
        return nullcontext(lambda done, reading: None)
    return _RichBar(updates, done)


class _RichBar(AbstractContextManager[Callable[[int, float | None], None]]):
    """A progress bar with the last reading of the accuracy meter.

    Args:
        updates: In all.
        done: So far.
    """

    def __init__(self, updates: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("inverse Fisher"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[reading]}")
        self._progress = Progress(*columns, TimeRemainingColumn())
        self._task = self._progress.add_task("", total=updates, completed=done, reading="")

    def __enter__(self) -> Callable[[int, float | None], None]:
        """Start the display."""
        self._progress.start()
        return self._show

    def _show(self, done: int, reading: float | None) -> None:
        text = "" if reading is None else f"residual {reading:.3f}"
        self._progress.update(self._task, completed=done, reading=text)

    def __exit__(self, *error: object) -> None:
        """End the display."""
        self._progress.stop()
