"""The migration page: its code runs, and every argument, layer and likelihood of the original is on it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fishleg_func as ff
from fishleg_func.likelihoods import Gaussian

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
SETTINGS, CHECK, CHECKPOINT = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[1:]

ORIGINAL = re.findall(
    r"\w+",
    """
model likelihood draw nll aux_loader aux_dataloader lr fish_lr eps beta weight_decay update_aux_every aux_lr aux_betas
aux_eps damping method method_kwargs precondition_aux u_sampling pre_aux_training sgd_lr scale fish_scale init_scale
warmup warmup_steps warmup_data warmup_loss normalization normalize_aux num_steps batch_speedup full config fine_tune
initialization module_names skip_names device writer aux_log verbose
step update_aux pretrain_fish warmup_aux aux_opt aux_loss initialise_FishModel init_model_aux update_dict
recursive_setattr recursive_getattr get_named_layers_by_regex Qv diagQ aux_parameters named_aux_parameters
not_aux_parameters named_not_aux_parameters add_warmup_grad finalise_warmup FishAuxParameter FISH_LAYERS FishModule
FishLinear FishConv2d FishEmbedding FishBatchNorm2d FishLayerNorm FishBertAttention
GaussianLikelihood BernoulliLikelihood SoftMaxLikelihood FishLikelihoodBase get_parameters
""",
)


def test_every_name_of_the_original_is_mapped() -> None:
    first_cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ")]
    mapped = set(re.findall(r"\w+", " ".join(first_cells)))
    assert set(ORIGINAL) - mapped == set()
    assert mapped >= set(ff.FISH_LIKELIHOODS) - {"poisson"}


def parts() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    return {"model": model, "likelihood": Gaussian(), "ff": ff, "fishlegify": ff.fishlegify, "nn": nn, "torch": torch}


def test_the_original_s_algorithm_trains() -> None:
    names = parts()
    exec(SETTINGS, names)
    x, y, step = torch.randn(20, 4), torch.randn(20, 2), names["step"]
    losses = [float(step(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert {type(q) for q in step.q.values()} == {ff.families.ScaledKronecker}


def test_the_check_finds_the_factor_of_the_original_s_example() -> None:
    names = {**parts(), "x": torch.randn(20, 4), "y": torch.randn(20, 2)}
    exec(CHECK, names)  # two outputs: D / 2 is one
    names["model"] = nn.Linear(4, 6)
    names["y"] = torch.randn(20, 6)
    with pytest.raises(ValueError, match="the gradient of the loss is 1/3 of that of"):
        exec(CHECK, names)


def test_a_checkpoint_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = parts()
    model = names["model"]
    state = {name: x + 1 for name, x in model.state_dict().items()}
    for path, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            m, n = layer.out_features, layer.in_features + 1
            aux = {"L": torch.eye(n), "R": torch.eye(m), "A": torch.full((m, n), 2.0)}
        elif isinstance(layer, nn.BatchNorm1d):
            aux = {"L_w": torch.full((3,), 2.0), "L_b": torch.full((3,), 2.0)}
        else:
            continue
        state |= {f"{path}.fishleg_aux.{name}": x for name, x in aux.items()}
    torch.save(state, "original.pt")
    exec(CHECKPOINT, names)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    for q in names["step"].q.values():
        torch.testing.assert_close(q.dense(), 4 * torch.eye(len(q.dense())))
