"""Checkpoints of the optimizer: bit-exact, in every format, whenever the process is killed."""

from __future__ import annotations

import copy
import io
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from cases import generator
from loops import MODELS, assert_same_state, built, optimizer_of, parameters, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fishleg_func as ff
from fishleg_func.likelihoods import Categorical


@pytest.mark.parametrize("at", [1, 5, 10, 13, 17])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_resuming_is_bit_exact(name: str, at: int) -> None:
    model = built(name).float()
    options: dict[str, Any] = {"update_aux_every": 4}

    def batches(i: int) -> tuple[Tensor, Tensor]:
        x, y = MODELS[name][1](i)
        return x.float(), y

    def run(optimizer: Any, model: nn.Module, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            x, y = batches(i)
            optimizer.zero_grad()
            Categorical().nll(model(x), y).backward()
            optimizer.step()

    optimizer = optimizer_of(model, **options)
    run(optimizer, model, range(at))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    run(optimizer, model, range(at, 22))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True, map_location="cpu")
    again = built(name).float()
    resumed = ff.FishLeg(again, Categorical(), generator=generator(99), **options)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, again, range(at, 22))
    assert torch.equal(parameters(model), parameters(again))
    assert_same_state(optimizer.fishleg.state_dict(), resumed.fishleg.state_dict())


def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed() -> None:
    model, other = built("mlp"), built("cnn")
    optimizer = optimizer_of(model)
    train(optimizer, model, "mlp", range(3))
    before = copy.deepcopy(optimizer.state_dict())
    strange = optimizer_of(other).state_dict()
    for bad in (strange, {**before, "state": {}}, {**before, "param_groups": strange["param_groups"]}):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert str(before["param_groups"]) == str(after["param_groups"])
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][0][k])) for k, v in before["state"][0].items()
    )


def test_a_loader_for_q_is_gone_through_and_its_position_resumed() -> None:
    taken: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for i in range(3):
                taken.append(i)
                yield MODELS["mlp"][1](i)

    model = built("mlp")
    optimizer = optimizer_of(model, aux_loader=Loader(), update_aux_every=4)
    train(optimizer, model, "mlp", range(9))  # Q is due in the steps 0, 1, 2, 3, 4, 8
    assert taken == [0, 1, 2, 0, 1, 2]
    state = optimizer.state_dict()
    again = built("mlp")
    again.load_state_dict(model.state_dict())
    resumed = optimizer_of(again, aux_loader=Loader(), update_aux_every=4)
    resumed.load_state_dict(state)
    for opt, m in ((optimizer, model), (resumed, again)):
        train(opt, m, "mlp", range(9, 20))
    assert torch.equal(parameters(model), parameters(again))


def trained() -> tuple[nn.Module, ff.FishLeg]:
    model = built("mlp")
    optimizer = optimizer_of(model, update_aux_every=4)
    train(optimizer, model, "mlp", range(7))
    return model, optimizer


def assert_goes_on_as(model: nn.Module, optimizer: ff.FishLeg, again: nn.Module, resumed: ff.FishLeg) -> None:
    for opt, m in ((optimizer, model), (resumed, again)):
        train(opt, m, "mlp", range(7, 14))
    assert torch.equal(parameters(model), parameters(again))
    assert_same_state(optimizer.fishleg.state_dict(), resumed.fishleg.state_dict())


def test_the_state_goes_through_safetensors(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = optimizer.fishleg.state_dict()
    safetensors.torch.save_file({k: torch.as_tensor(v) for k, v in state.items()}, tmp_path / "state.safetensors")
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    again = built("mlp")
    resumed = optimizer_of(again, update_aux_every=4)
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    resumed.fishleg.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert_goes_on_as(model, optimizer, again, resumed)


def test_the_state_goes_through_distributed_checkpoints(tmp_path: Path) -> None:
    model, optimizer = trained()
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    again = built("mlp")
    resumed = optimizer_of(again, update_aux_every=4)
    mine, its = get_state_dict(again, resumed)
    loaded = {"model": mine, "optimizer": its}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(again, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert_goes_on_as(model, optimizer, again, resumed)


KILLED = """
import os, signal, sys, torch
import fishleg_func as ff

class Deadly:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

ff.save_checkpoint({"value": torch.ones(1000)}, sys.argv[1])
print("saved", flush=True)
ff.save_checkpoint({"value": torch.zeros(1000), "last": Deadly()}, sys.argv[1])
"""


def test_a_process_that_is_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout == "saved\n"
    assert torch.equal(torch.load(path, weights_only=True)["value"], torch.ones(1000))


def test_a_save_that_fails_leaves_the_checkpoint_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    ff.save_checkpoint({"value": 1}, path)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        ff.save_checkpoint({"value": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"value": 1} and list(tmp_path.iterdir()) == [path]
