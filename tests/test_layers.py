"""Layer types: packing is a bijection, and rows, gradients and tangents are those that autograd finds in the layer."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from fishleg_func import LayerSpec, LowRank, reference, register_layer
from fishleg_func.convolutions import ConvSpec, ConvTransposeSpec
from fishleg_func.layers import LinearSpec
from fishleg_func.packed import table_shape
from fishleg_func.registry import _REGISTRY, find_spec

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spec_of(layer: nn.Module) -> LayerSpec:
    spec = find_spec(layer, tuple(name for name, p in layer.named_parameters() if p.requires_grad))
    assert spec is not None
    return spec


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- the contract: what holds for any layer at any input ---


def tensors_of(layer: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random directions in the layer's trainable parameters."""
    trainable = (item for item in layer.named_parameters() if item[1].requires_grad)
    return {name: randn(*p.shape, seed=seed + k) for k, (name, p) in enumerate(trainable)}


def check_packing(layer: nn.Module, spec: LayerSpec, *args: Any) -> None:
    tensors = tensors_of(layer, 1)
    u = spec.pack(tensors)
    assert tuple(u.shape) == tuple(spec.shape)
    back = spec.unpack(u)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], t) for name, t in tensors.items())
    positions, shape = reference.block_indices(layer)["(root)"]
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    assert torch.equal(u, flat[positions].reshape(shape))


def check_gradient(layer: nn.Module, spec: LayerSpec, *args: Any) -> None:
    out, pullback = vjp(lambda parameters: functional_call(layer, parameters, args), dict(layer.named_parameters()))
    x = spec.keep(args, {}, out)
    delta = randn(*out.shape, seed=2)
    (gradient,) = pullback(delta)
    expected = spec.pack({name: gradient[name] for name in spec.names})
    close(spec.output_rows(delta).mT @ spec.input_rows(x), expected)
    close(spec.gradient(x, delta), expected)


def check_tangent(layer: nn.Module, spec: LayerSpec, *args: Any) -> None:
    *groups, m, n = spec.shape
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    factored = LowRank(randn(*groups, 2, m, seed=3), randn(*groups, 2, n, seed=4))
    for v in (randn(*spec.shape, seed=5), factored):
        moves = spec.unpack(v if isinstance(v, Tensor) else v.d.mT @ v.a)
        moves = {name: moves.get(name, torch.zeros_like(p)) for name, p in parameters.items()}
        _, expected = jvp(lambda p: functional_call(layer, p, args), (parameters,), (moves,))
        actual = spec.tangent(spec.keep(args, {}, expected), v)
        assert actual.shape == expected.shape
        close(actual, expected)


CHECKS = (check_packing, check_gradient, check_tangent)


def check(layer: nn.Module, *args: Any) -> None:
    spec = spec_of(layer)
    for each in CHECKS:
        each(layer, spec, *args)


# --- linear ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_linear(bias: bool, lead: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 2, bias=bias).double()
    check(layer, randn(*lead, 3))
    assert spec_of(layer).shape == (2, 3 + bias)


def test_linear_takes_inputs_that_are_not_contiguous() -> None:
    check(nn.Linear(3, 2).double(), randn(3, 5, 4).transpose(0, 2).transpose(0, 1))


# --- convolutions ---


def conv(dim: int, channels: tuple[int, int], kernel: Any, **options: Any) -> nn.Module:
    return CONVS[dim](*channels, kernel, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    ("dim", "options"),
    [
        *((dim, {"padding": p}) for dim in (1, 2, 3) for p in ("same", "valid", 0, 2)),
        *(
            (dim, {"padding": 1, "padding_mode": mode})
            for dim in (1, 2, 3)
            for mode in ("reflect", "replicate", "circular")
        ),
        *(
            (dim, {"padding": "same", "padding_mode": mode, "dilation": 2})
            for dim in (1, 2)
            for mode in ("reflect", "circular")
        ),
        *((dim, {"stride": 2, "dilation": 2, "padding": 1}) for dim in (1, 2, 3)),
        (2, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        (3, {"stride": (1, 2, 3), "padding": (0, 1, 2), "dilation": (2, 1, 1)}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(dim: int, options: dict[str, Any], bias: bool, groups: int) -> None:
    kernel = (2, 3, 2)[:dim]  # an even kernel pads "same" by unequal amounts
    layer = conv(dim, (2, 4), kernel, bias=bias, groups=groups, **options)
    for x in (randn(2, 2, *(6, 5, 7)[:dim]), randn(2, *(6, 5, 7)[:dim])):  # with and without batch dimension
        try:
            layer(x)
        except (RuntimeError, NotImplementedError):  # torch itself does not pad in this way
            assert x.ndim == dim + 1 and options.get("padding_mode")
            continue
        check(layer, x)


def test_depthwise_convolution_has_a_row_for_each_channel() -> None:
    layer = conv(2, (3, 6), 3, groups=3)
    assert spec_of(layer).shape == (3, 2, 10)
    check(layer, randn(2, 3, 5, 4))


def test_convolution_takes_inputs_that_are_not_contiguous() -> None:
    check(conv(2, (4, 2), 2, groups=2), randn(3, 4, 5, 6).to(memory_format=torch.channels_last))
    check(conv(1, (2, 3), 2, bias=False), randn(3, 6, 2).transpose(1, 2))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dim = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dim))  # noqa: E731
    groups, kernel, dilation, stride = draw(st.integers(1, 3)), per_axis(1, 3), per_axis(1, 2), per_axis(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    padding = per_axis(0, 2) if padding == "numbers" else padding
    layer = conv(
        dim,
        (groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))),
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    lead = (draw(st.integers(1, 2)), layer.in_channels)
    return layer, randn(*lead, *per_axis(5, 7), seed=draw(st.integers(0, 2**31)))


@given(convolutions())
def test_any_convolution(drawn: tuple[nn.Module, Tensor]) -> None:
    check(*drawn)


# --- transposed convolutions ---


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    dim = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dim))  # noqa: E731
    groups, kernel, dilation, stride = draw(st.integers(1, 3)), per_axis(1, 3), per_axis(1, 2), per_axis(1, 3)
    extra = tuple(draw(st.integers(0, max(d, s) - 1)) for d, s in zip(dilation, stride, strict=True))
    layer = TRANSPOSED[dim](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=per_axis(0, 2),
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )
    batch = (draw(st.integers(1, 2)),)[draw(st.integers(0, 1)) :]
    x = randn(*batch, layer.in_channels, *per_axis(3, 5), seed=draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        return layer, x
    sizes = zip(x.shape[-dim:], stride, layer.padding, dilation, kernel, strict=True)
    least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in sizes]
    return layer, x, [n + draw(st.integers(0, s - 1)) for n, s in zip(least, stride, strict=True)]


@given(transposed_convolutions())
def test_any_transposed_convolution(drawn: tuple[Any, ...]) -> None:
    try:
        drawn[0](*drawn[1:])
    except RuntimeError:  # torch itself allows no empty output
        assume(False)
    check(*drawn)


@pytest.mark.parametrize("dim", TRANSPOSED)
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(dim: int, groups: int) -> None:
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": groups, "dtype": torch.float64}
    layer = TRANSPOSED[dim](4, 6, (3, 2, 4)[:dim], **options)
    assert spec_of(layer).shape[-1] == 4 // groups * layer.weight[0, 0].numel() + 1
    x = randn(2, 4, *(4, 3, 3)[:dim])
    check(layer, x)
    check(layer, x[0])
    check(layer, x, [n - 1 for n in layer(x).shape[2:]])


def test_the_rows_of_a_transposed_convolution_are_those_of_its_output_positions() -> None:
    layer, x = TRANSPOSED[1](1, 1, 2, stride=2, bias=False), torch.tensor([[[1.0, 2.0]]])
    rows = spec_of(layer).input_rows(spec_of(layer).keep((x,), {}, layer(x)))
    assert rows.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]


# --- frozen parameters ---


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2).double(), lambda: conv(1, (3, 2), 2)], ids=["linear", "conv"])
def test_a_frozen_bias_is_left_out_of_the_packing(make: Callable[[], Any]) -> None:
    layer = make()
    layer.bias.requires_grad_(False)
    assert spec_of(layer).shape[-1] == layer.weight[0].numel()
    check(layer, randn(2, 3, 4) if isinstance(layer, nn.Conv1d) else randn(2, 3))


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(1, 1, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("names", [("bias",), (), ("weight", "bias", "extra")])
def test_without_a_trainable_weight_each_parameter_stands_alone(layer: nn.Module, names: tuple[str, ...]) -> None:
    assert find_spec(layer, names) is None


@pytest.mark.parametrize(("shape", "packed"), [((), (1, 1)), ((3,), (1, 3)), ((2, 3), (2, 3)), ((2, 3, 4), (2, 12))])
def test_a_parameter_of_its_own_is_packed_as_a_table(shape: tuple[int, ...], packed: tuple[int, ...]) -> None:
    assert table_shape(torch.zeros(shape)) == packed


# --- which spec a module gets ---


class Inherits(nn.Linear):
    pass


class Overrides(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scale(nn.Module):
    """Entries times a weight: a layer type of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ScaleChild(Scale):
    pass


class ScaleSpec(LayerSpec):
    family = "diagonal"
    shape = (1, 3)

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["weight"].unsqueeze(0)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        return {"weight": u[0]}

    def input_rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1) * torch.eye(3, dtype=x.dtype).repeat(len(x), 1)

    def output_rows(self, delta: Tensor) -> Tensor:
        return delta.reshape(-1, 1)

    def tangent(self, x: Tensor, v: Tensor | LowRank) -> Tensor:
        return x * (v if isinstance(v, Tensor) else v.dense())


class TwiceSpec(LinearSpec):
    family = "eigen"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types registered in a test are forgotten after it."""
    for key in [key for key in _REGISTRY if key.__module__ == __name__]:
        del _REGISTRY[key]
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


def test_built_in_types() -> None:
    assert type(find_spec(nn.Linear(2, 2), ("weight",))) is LinearSpec
    assert all(type(find_spec(layer(1, 1, 1), ("weight",))) is ConvSpec for layer in CONVS.values())
    assert {spec.family for spec in (LinearSpec, ConvSpec)} == {"kfac"}
    assert all(type(find_spec(layer(1, 1, 1), ("weight",))) is ConvTransposeSpec for layer in TRANSPOSED.values())
    attention = nn.MultiheadAttention(2, 1)
    for other in (
        nn.LayerNorm(2),
        nn.Embedding(2, 2),
        nn.Bilinear(1, 1, 1),
        nn.Module(),
        attention,
        attention.out_proj,
    ):
        assert find_spec(other, ("weight",)) is None


def test_a_subclass_counts_while_it_inherits_forward() -> None:
    assert type(find_spec(Inherits(3, 2), ("weight", "bias"))) is LinearSpec
    assert find_spec(Overrides(3, 2), ("weight", "bias")) is None
    layer = Inherits(3, 2).double()
    check_gradient(layer, spec_of(layer), randn(4, 3))
    check_tangent(layer, spec_of(layer), randn(4, 3))


def test_a_type_of_ones_own_inherits_the_contract(registry: None) -> None:
    assert find_spec(Scale(), ("weight",)) is None
    register_layer(Scale, ScaleSpec)
    layer = Scale()
    spec = spec_of(layer)
    assert type(spec) is ScaleSpec and spec.family == "diagonal"
    check_gradient(layer, spec, randn(4, 3))
    check_tangent(layer, spec, randn(4, 3))
    assert type(find_spec(ScaleChild(), ("weight",))) is ScaleSpec


def test_a_registered_subclass_goes_before_its_base(registry: None) -> None:
    register_layer(Overrides, TwiceSpec)
    assert type(find_spec(Overrides(3, 2), ("weight", "bias"))) is TwiceSpec
    register_layer(Inherits, TwiceSpec)  # though its forward is that of its base
    assert type(find_spec(Inherits(3, 2), ("weight", "bias"))) is TwiceSpec
    assert type(find_spec(nn.Linear(3, 2), ("weight", "bias"))) is LinearSpec


def test_register_layer_errors() -> None:
    for module_type in (nn.Linear(1, 1), int, "Linear"):
        with pytest.raises(TypeError, match=r"module_type=.* must be a subclass of torch.nn.Module"):
            register_layer(module_type, LinearSpec)
    for spec in (LinearSpec(nn.Linear(1, 1), ("weight",)), nn.Linear, "kfac"):
        with pytest.raises(TypeError, match=r"spec=.* must be a subclass of fishleg_func.LayerSpec"):
            register_layer(nn.Linear, spec)
    assert _REGISTRY[nn.Linear] is LinearSpec


# --- a check that cannot fail is none: each is given a spec that breaks it ---

MUTATIONS = {
    check_packing: ("pack", lambda self, tensors: torch.zeros(self.shape).double()),
    check_gradient: ("gradient", lambda self, x, delta: torch.zeros(self.shape).double()),
    check_tangent: ("tangent", lambda self, x, v: functional_call(nn.Linear(3, 2).double(), {}, (x,))),
}


@pytest.mark.parametrize(
    ("each", "rows"),
    [*itertools.product(CHECKS, [False]), (check_gradient, True)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_each_check_fails_on_a_broken_spec(each: Callable[..., None], rows: bool) -> None:
    method, replacement = ("input_rows", lambda self, x: torch.ones(4, 4).double()) if rows else MUTATIONS[each]
    layer = nn.Linear(3, 2).double()
    each(layer, spec_of(layer), randn(4, 3))
    broken = type("Broken", (LinearSpec,), {method: replacement})(layer, ("weight", "bias"))
    with pytest.raises(AssertionError):
        each(layer, broken, randn(4, 3))
