"""The hooks of the optimizer: what they keep, for how long, and what becomes of them in copies."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from cases import randn
from loops import MODELS, built, optimizer_of, parameters
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical, Gaussian


def test_a_pass_that_no_backward_pass_reaches_is_let_go_with_its_graph() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    x, y = MODELS["mlp"][1](0)
    inputs = [x.clone() for _ in range(3)]
    seen = [StorageWeakRef(t.untyped_storage()) for t in inputs]
    first, *others = (model(t) for t in inputs)
    del inputs, others
    gc.collect()
    assert [len(optimizer._watch.passes()), *(ref.expired() for ref in seen)] == [0, False, True, True]
    Categorical().nll(first, y).backward()
    del first
    assert len(optimizer._watch.passes()) == 1
    optimizer.step()
    assert optimizer._watch.passes() == [] and optimizer.fishleg.steps == 1


def test_a_dropped_optimizer_is_freed_and_takes_its_hooks_along() -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer, schedule
    gc.collect()
    assert gone() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "average"])
def test_copies_of_the_model_are_not_watched(how: str) -> None:
    model = built("mlp")
    optimizer = optimizer_of(model)
    x, y = MODELS["mlp"][1](0)
    twin: Any
    if how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        copied = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
            "average": torch.optim.swa_utils.AveragedModel,
        }
        twin = copied[how](model)
    assert torch.equal(twin(x), model(x))
    Categorical().nll(twin(x), y).backward()
    assert optimizer._watch.passes() == []
    Categorical().nll(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(parameters(twin.module if how == "average" else twin), parameters(model))


class Cast(nn.Module):
    """Computes its loss, and returns copies of its outputs."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.copied = nn.Linear(4, 2), copied

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.layer(x)
        loss = (out[:3] - y[:3]).square().sum()
        return {"loss": loss, "out": out.clone() if self.copied else out.double()}


def test_the_gradient_is_seen_through_a_cast_and_told_where_it_is_not() -> None:
    x, y = randn(5, 4).float(), randn(5, 2).float()
    model = Cast(copied=False)
    optimizer = ff.FishLeg(model, Gaussian(), output=lambda d: d["out"].float())
    out = model(x, y)
    (3 * out["loss"]).backward()
    (seen,) = optimizer._watch.passes()
    assert seen.cotangent is not None
    expected = torch.zeros(5, 2).index_copy(0, torch.arange(3), 6 * (out["out"].float() - y)[:3].detach())
    assert torch.equal(seen.cotangent, expected)
    optimizer.step()

    model = Cast(copied=True)
    optimizer = ff.FishLeg(model, Gaussian(), output=lambda d: d["out"])
    model(x, y)["loss"].backward()
    with pytest.warns(UserWarning, match="no gradient came by at the model's outputs"):
        optimizer.step()


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            self.dtype = self.a(x).dtype
            return self.b(self.a(x).tanh()).float()


def test_autocast_within_the_model_is_off_while_q_learns() -> None:
    model = Autocast()
    enter = torch.autocast.__enter__
    optimizer = optimizer_of(model)
    x, y = MODELS["mlp"][1](0)
    x = x.float()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = Categorical().nll(model(x), y)
        assert model.dtype == torch.bfloat16
        loss.backward()
        due = optimizer.fishleg.due
        optimizer.step()
        assert (model.dtype == torch.float32) == due
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.autocast.__enter__ is enter
    assert all(row.capture == "rows" for row in optimizer.report().rows)


def test_several_processes_that_begin_later_and_their_wrappers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("mlp")
    with pytest.raises(TypeError, match=r"pass model\.module"):
        ff.FishLeg(nn.DataParallel(model), Categorical())
    optimizer = optimizer_of(model)
    x, y = MODELS["mlp"][1](0)
    Categorical().nll(model(x), y).backward()
    before = parameters(model)
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="2 processes train together"):
            optimizer.step()
    assert torch.equal(before, parameters(model))
    optimizer.step()
    assert not torch.equal(before, parameters(model))
