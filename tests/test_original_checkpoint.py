"""Checkpoints of the original: Q of what is loaded is the original's Qv, written out densely."""

import functools
import re
from typing import Any

import pytest
import torch
from test_likelihoods import close, randn
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.families import ScaledKronecker

SCALED = {"*": "scaled_kronecker"}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(5, 4),
        nn.LayerNorm(4),
        nn.Unflatten(1, (1, 6)),
        nn.Conv2d(1, 2, (2, 3)),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 3, 1, bias=False),
        nn.Flatten(),
        nn.Linear(30, 3),
        nn.Linear(3, 2, bias=False),
    ).double()


def aux_of(model: nn.Module) -> dict[str, Tensor]:
    """Entries of λ as the original names and shapes them, at random values."""
    aux: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        prefix = f"{path}.fishleg_aux" if path else "fishleg_aux"
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Linear | nn.Conv2d):
            m, n = len(layer.weight), layer.weight[0].numel() + bias
            shapes = {"L": (n, n), "R": (m, m), "A": (m, n)}
        elif isinstance(layer, nn.Embedding):
            m, n = layer.weight.shape
            shapes = {"L": (n, n), "R": (m,), "A": (m, n)}
        elif isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            shapes = {"L_w": tuple(layer.weight.shape), "L_b": tuple(layer.weight.shape)}
        else:
            continue
        for local, shape in shapes.items():
            value = randn(*shape, seed=len(aux))
            aux[f"{prefix}.{local}"] = value.abs() + 0.1 if local == "A" else value
    return aux


def saved(model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **aux_of(model)}


def original_qv(layer: nn.Module, aux: dict[str, Tensor], u: dict[str, Tensor]) -> dict[str, Tensor]:
    """Q u of one layer, dense: weight and bias as one vector, by the formulas of the original's files."""
    if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
        return {"weight": torch.diag(aux["L_w"] ** 2) @ u["weight"], "bias": torch.diag(aux["L_b"] ** 2) @ u["bias"]}
    weight = u["weight"].flatten(1)
    packed = torch.cat((weight, u["bias"][:, None]), 1) if "bias" in u else weight
    A, L, R = torch.diag(aux["A"].flatten()), aux["L"], aux["R"]
    if isinstance(layer, nn.Linear):  # RᵀR (A u) LLᵀ
        middle = torch.kron(R.T @ R, L @ L.T)
    elif isinstance(layer, nn.Conv2d):  # Rᵀ (R (A u) Lᵀ) L
        middle = torch.kron(R.T @ R, L.T @ L)
    else:  # an embedding: diag(R) diag(R) (A u) LLᵀ
        middle = torch.kron(torch.diag(R) @ torch.diag(R), L @ L.T)
    v = (A @ middle @ A @ packed.flatten()).view(packed.shape)
    return {"weight": v[:, : weight.shape[1]].reshape(u["weight"].shape)} | ({"bias": v[:, -1]} if "bias" in u else {})


def local_entries(entries: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): x for name, x in entries.items() if re.fullmatch(re.escape(prefix) + r"\w+", name)
    }


def test_q_of_what_is_loaded_is_that_of_the_original() -> None:
    torch.manual_seed(1)
    state = saved(net())
    torch.manual_seed(2)
    model = net()
    step = ff.fishlegify(model, q=SCALED, update_aux_every=0)
    own = ff.load_original_checkpoint(step.q, state)
    assert own.keys() == model.state_dict().keys()
    model.load_state_dict(own)
    tokens, labels = torch.arange(42).square().view(7, 6) % 5, torch.arange(7) % 2

    names = [name for name, _ in model.named_parameters()]
    gradient = dict(
        zip(
            names,
            torch.autograd.grad(nn.functional.cross_entropy(model(tokens), labels), list(model.parameters())),
            strict=True,
        )
    )
    natural = step.natural_gradient(tokens, labels)
    assert natural.keys() == set(names)
    for path, layer in model.named_children():
        u = local_entries(gradient, f"{path}.")
        if u:
            expected = original_qv(layer, local_entries(state, f"{path}.fishleg_aux."), u)
            torch.testing.assert_close(local_entries(natural, f"{path}."), expected, rtol=1e-9, atol=1e-12)
    assert not any(torch.allclose(natural[k], gradient[k]) for k in names)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.LayerNorm(3), nn.Embedding(4, 2)], ids=str)
def test_a_model_that_is_one_layer(layer: nn.Module) -> None:
    step = ff.fishlegify(layer.double(), q=SCALED)
    ff.load_original_checkpoint(step.q, saved(layer))
    aux = {name.removeprefix("fishleg_aux."): x for name, x in aux_of(layer).items()}
    u = {name: randn(*p.shape, seed=7) for name, p in layer.named_parameters()}
    expected = original_qv(layer, aux, u)
    ours: dict[str, Tensor] = {}
    for block in step.inverse_fisher().blocks:
        ours |= block.unpack(step.q[block.name](block.pack(u)), u)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_training_goes_on_from_what_was_loaded() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    step = ff.fishlegify(model, q=SCALED, lr=1e-3, aux_lr=1e-3)
    model.load_state_dict(ff.load_original_checkpoint(step.q, {k: x.float() for k, x in saved(model).items()}))
    loaded = step.q["0"].dense()
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    losses = [float(step(x, y))]
    change = (step.q["0"].dense() - loaded).norm() / loaded.norm()
    assert 0 < change < 0.05  # learned on, not begun anew
    losses += [float(step(x, y)) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_long_side_may_be_split_where_the_original_is_diagonal() -> None:
    model = nn.Embedding(5, 2).double()
    factory = functools.partial(ScaledKronecker, max_dim=3)
    step = ff.fishlegify(model, q={"*": factory})
    ff.load_original_checkpoint(step.q, saved(model))
    aux = {name.removeprefix("fishleg_aux."): x for name, x in aux_of(model).items()}
    u = randn(5, 2)
    close(step.q["weight"](u), original_qv(model, aux, {"weight": u})["weight"], 1e-9)


def test_some_layers_alone() -> None:
    model = net()
    step, state = ff.fishlegify(model, q={"7": "scaled_kronecker"}), saved(model)
    state = {name: x for name, x in state.items() if "fishleg_aux" not in name or name.startswith("7.")}
    before = step.q["3"].dense()
    ff.load_original_checkpoint({"7": step.q["7"]}, state)
    close(step.q["7"].R, state["7.fishleg_aux.R"])
    assert torch.equal(step.q["3"].dense(), before)


def norm_without_bias() -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(nn.LayerNorm(3, bias=False), nn.Linear(3, 2)).double()
    return model, saved(model)


def test_a_norm_without_bias_has_an_entry_that_means_nothing() -> None:
    model, state = norm_without_bias()
    assert "0.fishleg_aux.L_b" in state and "0.bias" not in state
    step = ff.fishlegify(model, q=SCALED)
    ff.load_original_checkpoint(step.q, state)
    close(step.q["0.weight"].diagonal().flatten(), state["0.fishleg_aux.L_w"] ** 2, 1e-9)


BERT = {
    f"attention.fishleg_aux.{name}": torch.eye(2)
    for name in ("L", "R", "U", "A", "B", "C", "D", "K", "Q", "V", "O", "Sk", "Sq", "Sv", "So")
}


def broken(**changes: Any) -> dict[str, Tensor]:
    """A checkpoint of two linear layers, with entries replaced, or taken out where ``None``; dots are ``__``."""
    state = saved(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double())
    state |= {name.replace("__", "."): x for name, x in changes.items()}
    return {name: x for name, x in state.items() if x is not None}


PROBLEMS = {
    "unknown": (
        broken(**{"0__fishleg_aux__Z": torch.ones(1)}),
        r"0: the entries \['A', 'L', 'R', 'Z'\] are those of no",
    ),
    "incomplete": (broken(**{"1__fishleg_aux__R": None}), r"1: the entries \['A', 'L'\] are those of no layer"),
    "no weight": (broken(**{"1__weight": None}), r"1: without an entry 1.weight, which says what layer it is"),
    "bert": (broken() | BERT, r"attention: attention of BERT, where one Q couples keys with queries"),
    "no block": (
        broken(**{f"2__fishleg_aux__{k}": torch.eye(2) for k in "LRA"}, **{"2__weight": torch.eye(2)}),
        r"2: has entries in the checkpoint, and no Q module",
    ),
    "no entries": (
        broken(**{f"1__fishleg_aux__{k}": None for k in "LRA"}),
        r"1: has no entries fishleg_aux\.\* in the checkpoint",
    ),
    "shape": (
        broken(**{"0__fishleg_aux__L": torch.eye(3), "0__fishleg_aux__A": torch.ones(2, 3)}),
        r"0: A is \(2, 3\) instead of \(2, 4\), L is \(3, 3\) instead of \(4, 4\) \(groups have one Q each here",
    ),
    "negative": (
        broken(**{"0__fishleg_aux__A": -torch.ones(2, 4)}),
        r"0: scales in \[-1, -1\] must be in \[1e-13, 1e\+13\], since they are e\^s here",
    ),
    "zero": (broken(**{"1__fishleg_aux__A": torch.zeros(2, 3)}), r"1: scales in \[0, 0\] must be"),
}


@pytest.mark.parametrize(("state", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_does_not_fit_is_named_and_nothing_is_changed(state: dict[str, Tensor], message: str) -> None:
    step = ff.fishlegify(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double(), q=SCALED)
    with pytest.raises(
        ValueError, match=rf"block by block, and nothing was changed: .*{message}.*To load only the model"
    ):
        ff.load_original_checkpoint(step.q, state)
    for q in step.q.values():
        assert torch.equal(q.dense(), torch.eye(len(q.dense())).double())


def test_all_problems_are_named_at_once() -> None:
    step = ff.fishlegify(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double())
    state = broken(**{"0__fishleg_aux__Z": torch.ones(1)}) | BERT
    with pytest.raises(ValueError) as error:
        ff.load_original_checkpoint(step.q, state)
    for part in ("0: the entries", "attention: attention of BERT", "1: is of the family KFAC, and must be of 'scaled_"):
        assert part in str(error.value)


def test_groups_and_plain_checkpoints_are_refused() -> None:
    model = nn.Conv2d(4, 2, 1, groups=2)
    step = ff.fishlegify(model, q=SCALED)
    with pytest.raises(ValueError, match=r"R is \(2, 2\) instead of \(2, 1, 1\) \(groups have one Q each here"):
        ff.load_original_checkpoint(step.q, saved(model))
    with pytest.raises(
        ValueError, match=r"has no entries 'fishleg_aux.\*', and must have some; load it with load_state"
    ):
        ff.load_original_checkpoint(step.q, model.state_dict())
