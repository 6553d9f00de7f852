"""One test for each defect of the original in how it walked and replaced modules, named by its number."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transform import LABELS, changed, hooks_of, randn, shape_of
from torch import Tensor, nn

import fishleg_func as ff
from fishleg_func.families import FAMILIES

X, Y = randn(12, 4).double(), randn(12, 3, seed=1).double()


def linear(outputs: int = 3, bias: bool = False) -> nn.Linear:
    return nn.Linear(4, outputs, bias=bias, dtype=torch.float64)


def mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 3)).double()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def assert_trains(model: nn.Module, x: Tensor, n: int = 5, **options: Any) -> ff.FishLegStep:
    """Every trainable parameter moves, no other does, and the loss falls."""
    before = values(model)
    step = ff.fishlegify(model, **options)
    losses = [float(step(x, LABELS)) for _ in range(n)]
    assert losses[-1] < losses[0]
    assert set(changed(before, values(model))) == {k for k, p in model.named_parameters() if p.requires_grad}
    return step


# Module traversal


def test_d21_containers_of_any_kind_are_walked() -> None:
    class Box(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": mlp(), "b": nn.ModuleList([nn.Linear(3, 3).double()])})

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner["b"][0](self.inner["a"](x))
            return logits

    step = assert_trains(nn.Sequential(Box()), X)
    assert step.q.keys() == {"0.inner.a.0", "0.inner.a.2", "0.inner.b.0"}


def test_d22_gradients_are_matched_by_name_in_mixed_models() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    ).double()
    truth = torch.autograd.grad(F.cross_entropy(model(X), LABELS), list(model.parameters()))
    ours = ff.fishlegify(model).natural_gradient(X, LABELS)
    torch.testing.assert_close(ours, dict(zip(values(model), truth, strict=True)))


def test_d23_frozen_and_unused_parameters_stay() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    before = values(model)
    step = ff.fishlegify(model, weight_decay=0.0)
    for _ in range(3):
        step(X, LABELS)
    assert set(before) - set(changed(before, values(model))) == {"0.weight", "unused"}
    assert {r.parameter: r.treatment for r in step.report().rows}["0.weight"] == "frozen"


def test_d24_query_key_and_value_have_the_gradients_of_their_own() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.query, self.value, self.out = (
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
            logits: Tensor = self.out(h.mean(1))
            return logits

    model, x = Attention(), randn(12, 5, 4)
    truth = torch.autograd.grad(F.cross_entropy(model(x), LABELS), list(model.parameters()))
    step = ff.fishlegify(model)
    torch.testing.assert_close(step.natural_gradient(x, LABELS), dict(zip(values(model), truth, strict=True)))
    assert step.q.keys() == {"key", "query", "value", "out"}


def test_d25_no_layer_is_owned_twice() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 3))
    step = ff.fishlegify(model)
    names = [r.parameter for r in step.report().rows]
    assert sorted(names) == sorted(values(model)) and len(set(names)) == len(names)
    assert max(len(m._forward_hooks) for m in model.modules()) == 1


def test_d26_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    tokens = torch.arange(12).square().view(12, 1) % 3
    step = assert_trains(model, tokens)
    assert step.q.keys() == {"0.weight", "2.bias"}  # one block for what two modules own
    assert model[2].weight is model[0].weight and isinstance(model[0].weight, nn.Parameter)
    step.remove()
    assert model[2].weight is model[0].weight


def test_d27_a_model_that_is_a_layer_is_trained() -> None:
    model = linear(bias=True)
    assert assert_trains(model, X).q.keys() == {"(root)"}
    assert dict(model.named_children()) == {}


def test_d28_patterns_match_whole_names() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)], nn.Linear(4, 3)).double()
    step = ff.fishlegify(model, include=["[0-9]", "1[01]"])
    assert step.q.keys() == {str(i) for i in range(12)}
    assert ff.fishlegify(model, include="1").q.keys() == {"1"}
    assert len(ff.fishlegify(model, include="*").q) == 13


def test_d29_a_misspelt_name_is_an_error() -> None:
    for argument, value in (
        ("include", "encoderr.*"),
        ("exclude", ["0", "2.wieght"]),
        ("q", {"0": "eigen", "3": "kfac"}),
    ):
        with pytest.raises(ValueError, match=rf"{argument}: the patterns .*(encoderr|wieght|'3').* match no"):
            ff.fishlegify(mlp(), **{argument: value})


def test_d31_norms_without_parameters_are_no_obstacle() -> None:
    assert_trains(mlp(nn.LayerNorm(6, elementwise_affine=False), nn.BatchNorm1d(6, affine=False)), X)


def test_d32_a_transformer_layer_is_trained_whole() -> None:
    body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    step = assert_trains(nn.Sequential(body, nn.Flatten(), nn.Linear(20, 3)), randn(12, 5, 4))
    assert "0.self_attn.in_proj_weight" in {r.parameter for r in step.report().rows}


# What replacing modules destroyed


def test_d33_float64_stays() -> None:
    model = mlp()
    assert assert_trains(model, X)(X, LABELS).dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_d34_frozen_stays_frozen() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    ff.fishlegify(model)(X, LABELS)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_d35_hooks_stay() -> None:
    model, calls = mlp(), list[int]()
    model[0].register_forward_hook(lambda *args: calls.append(1))
    hooks = hooks_of(model)
    with ff.fishlegify(model) as step:
        step(X, LABELS)
        assert calls
    assert hooks_of(model) == hooks


def test_d36_eval_stays_eval() -> None:
    model = mlp(nn.BatchNorm1d(6)).eval()
    buffers = dict(copy.deepcopy(model).named_buffers())
    ff.fishlegify(model)(X, LABELS)
    assert not any(m.training for m in model.modules())
    assert changed(buffers, dict(model.named_buffers())) == []


def test_d37_subclasses_and_parametrizations_keep_their_outputs() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer in (Doubled(4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))):
        model = nn.Sequential(layer).double()
        out, shape = model(X), shape_of(model)
        truth = torch.autograd.grad(F.cross_entropy(model(X), LABELS), list(model.parameters()))
        step = ff.fishlegify(model)
        assert torch.equal(model(X), out) and shape_of(model) == shape
        ours = step.natural_gradient(X, LABELS)
        torch.testing.assert_close(ours, dict(zip(values(model), truth, strict=True)))
        assert {row.capture for row in step.report().rows} == {"autograd"}  # not taken for a linear layer


def test_d38_a_missing_bias_stays_missing() -> None:
    model = mlp(nn.LayerNorm(6, bias=False))
    keys = list(model.state_dict())
    assert_trains(model, X)
    assert model[1].bias is None and list(model.state_dict()) == keys


def test_d40_embeddings_are_trained() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(4, 3))
    assert_trains(model, torch.arange(12).square().view(12, 1) % 3)
    assert model[0].weight.requires_grad


def test_d41_q_has_the_dtype_and_device_of_its_parameters() -> None:
    for dtype in (torch.float32, torch.float64):
        model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3)).to(dtype)
        step = ff.fishlegify(model)
        step(torch.arange(12).square().view(12, 1) % 3, LABELS)
        tensors = [t for q in step.q.values() for t in q.state_dict().values() if t.is_floating_point()]
        assert {t.dtype for t in tensors} == {dtype} and {t.device for t in tensors} == {model[3].weight.device}


def test_d42_a_table_never_costs_its_rows_squared() -> None:
    rows = 20_000
    model = nn.Sequential(nn.Embedding(rows, 2), nn.Flatten(), nn.Linear(2, 3))
    step = ff.fishlegify(model)
    step(torch.arange(12).view(12, 1), LABELS)
    sizes = {r.parameter: r.state_bytes for r in step.report().rows}
    assert 0 < sizes["0.weight"] < 100 * rows
    with pytest.raises(ValueError, match="dense"):
        ff.fishlegify(model, q={"0.weight": "dense"})


@pytest.mark.parametrize("family", FAMILIES)
def test_d43_q_modules_move_as_modules_do(family: str) -> None:
    q = FAMILIES[family]((2, 3))
    assert type(q).cuda is nn.Module.cuda and type(q).to is nn.Module.to
    assert q.to("meta") is q
    assert {t.device.type for t in q.state_dict().values()} == {"meta"}


def test_d44_the_model_has_no_parameters_of_the_step() -> None:
    model = mlp()
    shape = shape_of(model)
    step = ff.fishlegify(model)
    step(X, LABELS)
    assert shape_of(model) == shape
    ours = {p.data_ptr() for q in step.q.values() for p in q.parameters()}
    assert len(ours) == 4 and ours.isdisjoint(p.data_ptr() for p in model.parameters())


def test_d45_parameters_that_were_replaced_are_found() -> None:
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    steps = [ff.fishlegify(m) for m in (model, twin)]
    for i in range(3):
        if i == 1:
            model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()}, assign=True)
        assert torch.equal(*(step(X, LABELS) for step in steps))
    assert changed(values(model), values(twin)) == []
    assert len(list(model.parameters())) == 4
