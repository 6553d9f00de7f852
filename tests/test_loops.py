"""What loops do around an optimizer: autocast, scaling, clipping, compiled models, checkpointed activations."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from loops import MODELS, built, labels, optimizer_of, parameters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical


def fixed(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A float32 model, without dropout, and a batch it can learn."""
    model = built(name).float()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    x, y = MODELS[name][1](0)
    return model, x.float() if x.is_floating_point() else x, y


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_bfloat16_autocast_trains_to_the_loss_of_float32(name: str) -> None:
    final = []
    for enabled in (False, True):
        model, x, y = fixed(name)
        optimizer = optimizer_of(model, lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs = model(x)
                loss = Categorical().nll(outputs, y)
            assert outputs.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss.backward()
            optimizer.step()
        assert all(t.dtype != torch.bfloat16 for t in optimizer.fishleg.state_dict().values() if isinstance(t, Tensor))
        final.append(Categorical().nll(model(x), y).item())
    start = Categorical().nll(fixed(name)[0](x), y).item()
    assert final[0] < 0.8 * start
    assert final[1] == pytest.approx(final[0], rel=0.02)


def test_a_scaler_that_finds_infinity_leaves_the_step_out_and_the_next_one_is_right() -> None:
    model, x, y = fixed("mlp")
    other = fixed("mlp")[0]
    optimizer, plain = optimizer_of(model), optimizer_of(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(14):
        optimizer.zero_grad()
        loss = Categorical().nll(model(x), y)
        scaler.scale(loss * (float("inf") if i == 5 else 1.0)).backward()
        before = parameters(model)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, parameters(model)) == (i == 5)
        if i != 5:
            plain.zero_grad()
            Categorical().nll(other(x), y).backward()
            plain.step()
    assert scaler.get_scale() == 2.0**9
    assert (parameters(model) - parameters(other)).abs().max() <= 1e-5


def test_clipped_gradients_are_what_is_followed() -> None:
    options: dict[str, Any] = {"step_norm": None, "beta": 0.0, "momentum": "before", "damping": 1.0, "lr": 0.1}
    moves = []
    x, y = MODELS["mlp"][1](0)
    for clip in (None, 1e-3):
        model = built("mlp")
        optimizer = optimizer_of(model, **options)
        before = parameters(model)
        Categorical().nll(model(x), y).backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)
        optimizer.step()
        moves.append((parameters(model) - before) / size.clamp(max=clip or 1e9))
    assert torch.allclose(*moves, rtol=1e-5)


def test_a_compiled_model_is_watched_from_outside() -> None:
    model, x, y = fixed("mlp")
    other = fixed("mlp")[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer, plain = optimizer_of(compiled), optimizer_of(other)
    for _ in range(14):
        for m, opt in ((compiled, optimizer), (other, plain)):
            opt.zero_grad()
            Categorical().nll(m(x), y).backward()
            opt.step()
    assert (parameters(model) - parameters(other)).abs().max() <= 1e-5


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.reentrant is None:
            h = self.b(h).tanh()
        else:
            h = checkpoint(lambda h: self.b(h).tanh(), h, use_reentrant=self.reentrant)
        logits: Tensor = self.c(h)
        return logits


def followed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    optimizer = optimizer_of(model)
    for _ in range(14):
        optimizer.zero_grad()
        Categorical().nll(model(x), y).backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    x, y = MODELS["mlp"][1](0)
    plain = followed(Checkpointed(None).double(), x, y)
    found = followed(Checkpointed(reentrant).double(), x, y)
    assert (found - plain).abs().max() <= 1e-6


def test_models_of_dicts_keywords_and_several_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, *, other: Tensor, flag: bool = False) -> dict[str, Tensor]:
            return {"aux": x.sum(), "logits": self.a(x) + self.b(other) * flag}

    x, y = MODELS["mlp"][1](0)
    model, same = Pair().double(), Pair().double()
    optimizer = optimizer_of(model, output=lambda out: out["logits"])
    step = ff.fishlegify(
        same, Categorical(), output=lambda out: out["logits"], generator=torch.Generator().manual_seed(3)
    )
    for _ in range(12):
        optimizer.zero_grad()
        Categorical().nll(model(x, other=x.flip(0), flag=True)["logits"], y).backward()
        optimizer.step()
        step({"x": x, "other": x.flip(0), "flag": True}, y)
    assert (parameters(model) - parameters(same)).abs().max() <= 1e-6


def test_micro_batches_of_different_shapes_are_not_joined() -> None:
    model = built("transformer")
    optimizer = optimizer_of(model)
    for i in range(12):
        optimizer.zero_grad()
        for length in (3, 5):
            x = labels(4, length, seed=i, classes=7)
            (Categorical().nll(model(x), x) / 2).backward()
        optimizer.step()
    assert parameters(model).isfinite().all()


def test_training_in_bfloat16_keeps_q_in_float32() -> None:
    model, x, y = fixed("mlp")
    model, x = model.bfloat16(), x.bfloat16()
    optimizer = optimizer_of(model)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            optimizer.zero_grad()
            loss = Categorical().nll(model(x).float(), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for q in optimizer.fishleg.q.values() for p in q.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_gradients_by_torch_func_are_not_passes_of_the_loop() -> None:
    model, x, y = fixed("mlp")
    other = fixed("mlp")[0]
    optimizer, plain = optimizer_of(model), optimizer_of(other)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return Categorical().nll(torch.func.functional_call(model, params, (x[None],)), y[None])

    for _ in range(12):
        optimizer.zero_grad()
        plain.zero_grad()
        Categorical().nll(model(x), y).backward()
        torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(model.named_parameters()), x, y)
        Categorical().nll(other(x), y).backward()
        optimizer.step()
        plain.step()
    assert torch.equal(parameters(model), parameters(other))
