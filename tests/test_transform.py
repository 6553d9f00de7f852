"""Wrapping a model changes nothing about it: before, between and after steps."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import identical
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical

LABELS = torch.arange(12) % 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module, step: ff.FishLegStep | None = None) -> dict[str, Tensor]:
    """Return copies of parameters, buffers, gradients, the global random state and Q."""
    kept = {f"model.{name}": t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    kept |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    kept["random state"] = torch.get_rng_state()
    if step is not None:
        kept |= {f"q.{name}.{k}": t for name, q in step.q.items() for k, t in q.state_dict().items()}
        kept |= {f"hyper.{name}": t for name, t in vars(step.hyper).items()}
    return {name: t.detach().clone() for name, t in kept.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Return the names of what is not the same to the last bit."""
    names = sorted(before.keys() | after.keys())
    return [k for k in names if k not in before or k not in after or not identical(before[k], after[k])]


class Shape(NamedTuple):
    """What of a model must stay the same objects."""

    parameters: dict[str, int]
    trainable: list[bool]
    keys: list[str]
    modules: dict[str, tuple[type[nn.Module], bool]]


HOOKS = [f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre", "state_dict")]


def shape_of(model: nn.Module) -> Shape:
    """Return identities of parameters (tied ones under each name), keys, types and modes."""
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    return Shape(
        {name: id(p) for name, p in named.items()},
        [p.requires_grad for p in named.values()],
        list(model.state_dict()),
        {name: (type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)},
    )


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    return {f"{name}{kind}": list(getattr(m, kind).values()) for name, m in model.named_modules() for kind in HOOKS}


class Scored(nn.Module):
    """An embedding whose table is the output head too, with frozen scale and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(self.embed(tokens).mean(1) * self.scale))
        return logits


class Encoder(nn.Module):
    """A transformer layer, a weight-normalized layer and a frozen one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.middle = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 3).requires_grad_(False)
        self.head.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.layer(x)).mean(1))
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def cnn() -> nn.Module:
    body = [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2, bias=False)]
    return nn.Sequential(*body, nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(16, bias=False), nn.Linear(16, 3))


def two_tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 3))


def one_layer_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
MODELS: dict[str, Case] = {
    "mlp": (mlp, lambda: randn(12, 4)),
    "cnn": (cnn, lambda: randn(12, 2, 5, 5)),
    "encoder": (Encoder, lambda: randn(12, 5, 4)),
    "table is head": (Scored, lambda: torch.arange(36).view(12, 3) % 3),
    "two tied": (two_tied, lambda: randn(12, 4)),
    "one layer twice": (one_layer_twice, lambda: randn(12, 4)),
    "root layer": (lambda: nn.Linear(4, 3), lambda: randn(12, 4)),
}
models = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = MODELS[name][0](), MODELS[name][1]()
    torch.manual_seed(1)
    return model, inputs


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the output at a fixed random state, in a copy, so that buffers stay."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        out: Tensor = copy.deepcopy(model)(x)
    return out


@models
def test_wrapping_and_removing_change_nothing(name: str) -> None:
    model, x = make(name)
    values, shape, hooks, out = snapshot(model), shape_of(model), hooks_of(model), output_of(model, x)
    step = ff.fishlegify(model)
    assert (changed(values, snapshot(model)), shape_of(model)) == ([], shape)
    assert torch.equal(output_of(model, x), out)  # the hooks are inert outside of a step
    step.remove()
    assert (shape_of(model), hooks_of(model)) == (shape, hooks)
    assert torch.equal(output_of(model, x), out)


@models
def test_steps_change_values_and_nothing_else(name: str) -> None:
    model, x = make(name)
    values, shape, hooks = snapshot(model), shape_of(model), hooks_of(model)
    with ff.fishlegify(model) as step:
        for _ in range(3):
            step(x, LABELS)
        assert shape_of(model) == shape
        assert not [k for k in snapshot(model) if k.startswith("grad.")]
    trainable = {f"model.{k}" for k, p in model.named_parameters() if p.requires_grad}
    buffers = {f"model.{k}" for k, _ in model.named_buffers()}
    moved = set(changed(values, snapshot(model))) - {"random state"}
    assert trainable <= moved <= trainable | buffers
    assert hooks_of(model) == hooks
    assert_copies(model, x)


def assert_copies(model: nn.Module, x: Tensor) -> None:
    """Copies in memory and through pickle have the same outputs, and tie what the model ties."""
    copies = [copy.deepcopy(model)]
    if not any(nn.utils.parametrize.is_parametrized(m) for m in model.modules()):  # torch does not pickle these
        copies.append(pickle.loads(pickle.dumps(model)))
    for twin in copies:
        assert list(twin.state_dict()) == list(model.state_dict())
        assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert torch.equal(output_of(twin, x), output_of(model, x))


def test_leaving_the_context_removes_also_after_an_error() -> None:
    model, x = make("mlp")
    hooks = hooks_of(model)
    with pytest.raises(ZeroDivisionError), ff.fishlegify(model) as step:
        assert hooks_of(model) != hooks
        raise ZeroDivisionError
    assert hooks_of(model) == hooks
    step.remove()  # again: nothing happens
    with pytest.raises(RuntimeError, match="fishlegify"):
        step(x, LABELS)


def test_existing_forward_hooks_stay_and_fire_as_in_a_plain_forward() -> None:
    model, x = make("mlp")
    fired: list[str] = []
    model[0].register_forward_pre_hook(lambda m, args: fired.append("pre"))
    model[0].register_forward_hook(lambda m, args, out: fired.append("forward"))
    model.register_forward_hook(lambda m, args, out: fired.append("model"))
    hooks = hooks_of(model)
    with ff.fishlegify(model) as step:
        step(x, LABELS)
        assert fired and len(fired) % 3 == 0 and fired[:3] == ["pre", "forward", "model"]
        fired.clear()
        step(x, LABELS)  # shapes are known: one forward pass
        assert fired == ["pre", "forward", "model"]
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_that_changes_outputs_gives_the_gradient_of_the_changed_model(late: bool) -> None:
    model, x = make("one layer twice")

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return 3 * out.sin()

    if not late:
        model[0].register_forward_hook(hook)
    step = ff.fishlegify(model)
    if late:
        model[0].register_forward_hook(hook)
    g = step.natural_gradient(x, LABELS)  # Q is the identity before the first step
    truth = torch.autograd.grad(nn.functional.cross_entropy(model(x), LABELS), list(model.parameters()))
    for (name, _), t in zip(model.named_parameters(), truth, strict=True):
        torch.testing.assert_close(g[name], t)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_stay_and_steps_work_or_say_why_not(kind: str) -> None:
    model, x = make("mlp")
    fired: list[int] = []
    getattr(model[0], kind)(lambda *args: fired.append(1))
    hooks = hooks_of(model)
    twin = copy.deepcopy(model)
    try:
        with ff.fishlegify(model) as step:
            step(x, LABELS)
    except (ValueError, RuntimeError) as error:
        assert "backward" in str(error) and "hook" in str(error) and "remove" in str(error)
        assert changed(snapshot(twin), snapshot(model)) == []
    assert hooks_of(model) == hooks
    fired.clear()
    model(x).sum().backward()
    assert fired == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model, x = make("cnn")
    model.to(dtype)
    with ff.fishlegify(model) as step:
        loss = step(x.to(dtype), LABELS)
        assert loss.dtype == dtype and loss.shape == ()
        assert {t.dtype for q in step.q.values() for t in q.state_dict().values() if t.is_floating_point()} == {dtype}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works(dtype: torch.dtype) -> None:
    model, x = make("mlp")
    model.to(dtype)
    with ff.fishlegify(model) as step:
        losses = [float(step(x.to(dtype), LABELS)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_batchnorm_statistics_are_those_of_one_plain_forward_per_step() -> None:
    model, x = make("cnn")
    step = ff.fishlegify(model)
    for seed in range(3):
        batch = x + seed
        plain = copy.deepcopy(model)
        plain(batch)
        step(batch, LABELS)
        expected = dict(plain.named_buffers())
        assert changed(expected, {k: b.clone() for k, b in model.named_buffers()}) == []
    assert model[1].num_batches_tracked == 3
    model.eval()
    before = dict(copy.deepcopy(model).named_buffers())
    step(x, LABELS)
    assert changed(before, dict(model.named_buffers())) == []


@pytest.mark.parametrize("name", ["mlp", "encoder", "table is head"])
def test_the_random_stream_advances_as_in_one_plain_forward(name: str) -> None:
    model, x = make(name)
    step = ff.fishlegify(model)
    for every in (x, x, x[:7], x):
        torch.manual_seed(3)
        copy.deepcopy(model)(every)
        expected = torch.get_rng_state()
        torch.manual_seed(3)
        step(every, LABELS[: len(every)])
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical", "antithetic"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_calls_that_only_look_change_nothing(name: str, fisher: str) -> None:
    model, x = make(name)
    model(x).sum().backward()  # gradients of the user's own
    step = ff.fishlegify(model, fisher=fisher)
    for _ in range(2):
        before = snapshot(model, step)
        step.natural_gradient(x, LABELS)
        step.accuracy(x, n=2)
        str(step.report())
        assert changed(before, snapshot(model, step)) == []
        step.update_aux(x, LABELS)
        moved = changed(before, snapshot(model, step))
        assert moved and all(k.startswith("q.") for k in moved)
        step(x, LABELS)
        assert not [k for k in changed(before, snapshot(model, step)) if k.startswith("grad.")]


class Own(Categorical):
    """Only what must be defined is: the Fisher is estimated from samples."""

    score, fisher, weight = ff.likelihoods.Likelihood.score, ff.likelihoods.Likelihood.fisher, Categorical.weight


@pytest.mark.parametrize("options", [{}, {"fisher": "sampled"}, {"fisher": "antithetic"}, {"u": "gaussian"}])
@pytest.mark.parametrize("likelihood", [Categorical(), Own()], ids=["built in", "own"])
def test_equal_generators_give_equal_steps(options: dict[str, Any], likelihood: Any) -> None:
    q = []
    for seed in (1, 1, 2):
        model, x = make("mlp")
        step = ff.fishlegify(model, likelihood, generator=torch.Generator().manual_seed(seed), **options)
        for _ in range(2):
            step(x, LABELS)
        step.update_aux(x, LABELS)
        q.append({f"{k}.{n}": t for k, m in step.q.items() for n, t in m.state_dict().items()})
    assert changed(q[0], q[1]) == []
    assert changed(q[0], q[2])
