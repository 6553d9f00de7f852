"""What every test starts from: one thread, a seed, and Hypothesis that draws the same examples everywhere."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from torchvision_repair import repair

repair()

torch.set_num_threads(1)  # sums in one order, and no fight over few cores

_slow = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci", max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=_slow
)
settings.register_profile("dev", max_examples=8, deadline=None, suppress_health_check=_slow)
settings.load_profile("ci" if os.environ.get("CI") else os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="PATH", help="write the matrix of layer types and ways of training here")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
