"""What is packed without hooks, and every layer type in a whole step: against autograd and the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LIKELIHOODS, Case, filled, generator, randn, randomize_, targets_for
from test_step_oracle import LEARN, PLAIN, REFRESH, check_steps
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func import reference
from fishleg_func.kernels import embedding_bag
from fishleg_func.packed import Channels, find_layouts

# --- layouts ---


def own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), {"in_proj_weight": (3, 4, 5)}),
    "attention without bias": (lambda: nn.MultiheadAttention(4, 2, bias=False), {"in_proj_weight": (3, 4, 4)}),
    "attention, separate": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        {"q_proj_weight": (4, 4), "k_proj_weight": (4, 3), "v_proj_weight": (4, 5)},
    ),
    "lstm": (
        lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2),
        {
            f"weight_{kind}_l{k}": shape
            for k in (0, 1)
            for kind, shape in (("ih", (16, 4 - k)), ("hh", (16, 3)), ("hr", (2, 4)))
        },
    ),
    "gru": (
        lambda: nn.GRU(3, 4, bidirectional=True),
        {f"weight_{kind}_l0{way}": (12, n) for way in ("", "_reverse") for kind, n in (("ih", 4), ("hh", 5))},
    ),
    "rnn without bias": (lambda: nn.RNN(3, 4, bias=False), {"weight_ih_l0": (4, 3), "weight_hh_l0": (4, 4)}),
    **{
        cell.__name__: (lambda cell=cell: cell(3, 4), {"weight_ih": (4 * g, 4), "weight_hh": (4 * g, 5)})
        for cell, g in ((nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4))
    },
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), {"weight": (4, 7)}),
    "own forward": (lambda: OwnForward(3, 2), {"weight": (2, 4)}),
    "RMSNorm": (lambda: nn.RMSNorm(3), {}),
    "norm without affine": (lambda: nn.BatchNorm1d(3, affine=False), {}),
    "norm without bias": (lambda: nn.LayerNorm(3, bias=False), {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    make, shapes = LAYOUTS[name]
    module = make().double()
    layouts = find_layouts(module, own(module))
    assert {layout.names[0]: layout.shape for layout in layouts} == shapes
    oracle = reference.block_indices(module) if layouts else {}
    flat = reference.flat_parameters(module) if layouts else torch.empty(0)
    for layout in layouts:
        tensors = {n: own(module)[n].detach() for n in layout.names}
        u = layout.pack(tensors)
        assert u.shape == layout.shape
        back = layout.unpack(u)
        assert back.keys() == tensors.keys() and all(torch.equal(back[n], t) for n, t in tensors.items())
        where, shape = oracle["(root)" if layout.names[0] == "weight" else layout.names[0]]
        assert torch.equal(u, flat[where].reshape(shape))


@pytest.mark.parametrize("norm", [nn.LayerNorm((2, 3)), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_the_channels_of_a_norm(norm: nn.Module) -> None:
    filled(norm)
    layout = Channels(own(norm)["weight"])
    tensors = {n: p.detach() for n, p in own(norm).items()}
    u = layout.pack(tensors)
    assert torch.equal(u, torch.stack([t.flatten() for t in tensors.values()], -1).unsqueeze(1))
    assert all(torch.equal(layout.unpack(u)[n], t) for n, t in tensors.items())


# --- whole steps against the oracle ---


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = nn.Bilinear(2, 2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x[:, :2], x[:, 1:]).tanh())


class Mean(nn.Module):
    """The mean output of a recurrent layer, and a head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0].mean(1))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, held directly, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)
        self.a, self.b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + self.scale * (x @ self.a.T @ self.b.T)).tanh())


class TiedTable(nn.Module):
    """The head, which comes first, has the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(3, 6), nn.Embedding(6, 3)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


class Bags(nn.Module):
    def __init__(self, mode: str, weighted: bool = False) -> None:
        super().__init__()
        self.bag, self.head, self.weighted = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=2), nn.Linear(3, 2), weighted

    def forward(self, x: Tensor) -> Tensor:
        weights = {"per_sample_weights": x.to(self.bag.weight.dtype).cos()} if self.weighted else {}
        return self.head(self.bag(x, **weights).tanh())


def unet() -> nn.Module:
    up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
    return nn.Sequential(nn.Conv2d(1, 4, 2, stride=2, padding_mode="circular", padding=1), nn.Tanh(), up, nn.Flatten())


def normalized() -> nn.Module:
    norms = [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.BatchNorm1d(4)]
    return nn.Sequential(nn.Conv1d(2, 4, 2), *norms, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def parametrized() -> nn.Module:
    weight_norm, spectral_norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))


CASES = {
    "bilinear": Case(Both, (3,)),
    "lstm": Case(lambda: Mean(nn.LSTM(2, 3, proj_size=2, batch_first=True)), (3, 2)),
    "gru": Case(lambda: Mean(nn.GRU(2, 1, bidirectional=True, batch_first=True)), (3, 2)),
    "cells": Case(Cells, (3, 2)),
    "adapter": Case(Adapted, (3,)),
    "tied": Case(TiedTable, (3,), vocabulary=6),
    "transposed": Case(unet, (1, 3, 3)),
    "norms": Case(normalized, (2, 4)),
    "weight norm": Case(weight_normed, (3,)),
    **{f"bag, {mode}": Case(lambda mode=mode: Bags(mode), (3,), vocabulary=6) for mode in ("mean", "sum", "max")},
    "bag, weighted": Case(lambda: Bags("sum", weighted=True), (3,), vocabulary=6),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str) -> None:
    model, x = CASES[name].model(), CASES[name].inputs()
    y = targets_for(model, x, "gaussian")
    options: dict[str, Any] = {"damping": 0.05, "update_aux_every": 10, "aux_lr": 0.3, "generator": generator(0)}
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"], **options)
    randomize_(step)
    check_steps(step, x, y, "gaussian", (LEARN, PLAIN))


@pytest.mark.parametrize("name", [*CASES, "parametrized"])
def test_every_parameter_trains_and_its_treatment_is_reported(name: str) -> None:
    case = CASES.get(name) or Case(parametrized, (3,))
    model, x = case.model().float(), case.inputs(12)
    x = x if case.vocabulary else x.float()
    y = targets_for(model, x, "gaussian") + 1
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"])
    losses = [float(step(x, y)) for _ in range(12)]
    assert losses[-1] < losses[0]
    rows = {r.parameter: r for r in step.report().rows}
    assert rows.keys() == before.keys()
    for key, p in model.named_parameters():
        frozen = rows[key].treatment == "frozen"
        assert torch.equal(p, before[key]) == frozen, key
        hooked = isinstance(model.get_submodule(key.rpartition(".")[0]), (nn.Linear, nn.modules.conv._ConvNd))
        source = "rows" if hooked and rows[key].block != key else "autograd"
        assert rows[key].capture == ("" if frozen else source), key


EXPECTED = {
    "adapter": {"a": "kfac", "b": "kfac", "scale": "diagonal", "base.weight": "frozen", "head.weight": "kfac"},
    "tied": {"head.weight": "embedding", "head.bias": "diagonal"},
    "bag, max": {"bag.weight": "embedding", "head.weight": "kfac"},
    "lstm": {"inner.weight_ih_l0": "kfac", "inner.bias_hh_l0": "kfac", "inner.weight_hr_l0": "kfac"},
    "weight norm": {"0.parametrizations.weight.original0": "diagonal", "0.parametrizations.weight.original1": "kfac"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_treatments(name: str) -> None:
    rows = {r.parameter: r.treatment for r in ff.fishlegify(CASES[name].model()).report().rows}
    assert {k: rows[k] for k in EXPECTED[name]} == EXPECTED[name]


def test_a_large_table_has_nothing_that_grows_as_its_rows_squared() -> None:
    model = TiedTable()
    model.table = nn.Embedding(50_000, 4)
    model.head = nn.Linear(4, 50_000)
    model.head.weight = model.table.weight
    step = ff.fishlegify(model)
    assert step.q["head.weight"].shape == (50_000, 4)
    assert sum(r.state_bytes for r in step.report().rows) < 50_000 * 5 * 4 * 10


# --- bags ---


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("last", [None, False, True])
def test_embedding_bag_is_torch_s(mode: str, padding_idx: int | None, last: bool | None) -> None:
    weight, indices = randn(5, 3), torch.randint(5, (12,), generator=generator(0))
    options: dict[str, Any] = {"mode": mode, "padding_idx": padding_idx}
    if last is None:
        indices = indices.view(3, 4)
    else:
        options |= {"offsets": torch.tensor([0, 2, 2, 7] + [12] * last), "include_last_offset": last}
    if mode == "sum":
        options["per_sample_weights"] = randn(*indices.shape, seed=1)
    torch.testing.assert_close(embedding_bag(indices, weight, **options), F.embedding_bag(indices, weight, **options))


# --- what cannot be trained ---


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_tables_whose_gradient_is_not_one(kind: type[nn.Module], option: dict[str, Any]) -> None:
    (name, value), model = *option.items(), nn.Sequential(kind(5, 3, **option), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=rf"{name}={value} of the embedding '0' must be .*exclude='0'"):
        ff.fishlegify(model)
    assert ff.fishlegify(model, exclude="0").q.keys() == {"1"}


def test_a_lazy_module_must_have_seen_a_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0.weight' of a lazy module must be initialized: run the model on a batch"):
        ff.fishlegify(model)
    model(torch.ones(2, 4))
    assert ff.fishlegify(model).q["0"].shape == (3, 5)


def test_the_first_refresh_is_from_the_statistics_of_dense_gradients() -> None:
    model, x = CASES["lstm"].model(), CASES["lstm"].inputs(40)
    step = ff.fishlegify(model, LIKELIHOODS["gaussian"])
    y = targets_for(model, x, "gaussian")
    step._t = REFRESH
    step(x, y)
    q = step.q["inner.weight_hh_l0"]
    assert q.count == 1 and q.cov_L.norm() > 0 and not torch.equal(q.C_L, torch.eye(3).double())
