"""The example of what comes after training, in short."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--hidden", "8", "--epochs", "3", "--updates", "10"]


@pytest.fixture
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("after_training")
    sys.path.remove(str(EXAMPLES))


def test_every_part_draws_its_picture(example: ModuleType, tmp_path: Path) -> None:
    found = example.main([*SHORT, "--folder", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forgetting.png", "influence.png", "uncertainty.png"]
    curves = found["uncertainty"]
    assert {len(curve) for curve in curves.values()} == {len(example.ANGLES)}
    assert curves["MAP"][0].accuracy > 0.5 > curves["MAP"][6].accuracy  # upright and lying
    assert curves["Laplace, probit"][6].nll < curves["MAP"][6].nll
    scores, worst = found["influence"]
    assert scores.shape == (len(worst), 1438) and torch.isfinite(scores).all() and scores.std() > 0
    assert {name: len(curve) for name, curve in found["forgetting"].items()} == dict.fromkeys(example.PENALTIES, 4)
    ends = {curve[-1] for curve in found["forgetting"].values()}
    assert len(ends) > 1 and all(0 <= accuracy <= 1 for pair in ends for accuracy in pair)


def test_calibration_of_known_probabilities(example: ModuleType) -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.3, 0.7]])
    found = example.Calibration.of(probabilities, torch.tensor([0, 1, 1, 1]))
    assert found.accuracy == 0.75
    assert found.ece == pytest.approx((abs(1 - 1.6) + abs(2 - 1.4)) / 4, abs=1e-6)
    assert found.nll == pytest.approx(-(math.log(0.8) + math.log(0.2) + 2 * math.log(0.7)) / 4, abs=1e-6)


def test_a_quarter_turn_moves_pixels_and_a_whole_one_none(example: ModuleType) -> None:
    image = torch.arange(64.0).view(1, 64)
    assert torch.allclose(example.turned(image, 360), image, atol=1e-2)
    quarter = example.turned(image, 90).view(8, 8)
    assert torch.allclose(quarter, image.view(8, 8).rot90(1), atol=1e-2) or torch.allclose(
        quarter, image.view(8, 8).rot90(-1), atol=1e-2
    )
