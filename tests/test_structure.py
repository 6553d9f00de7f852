"""The layout: imports go one way, the oracle stands alone, files stay short and finished."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fishleg_func"
MAX_LINES = 400
FOLDERS = ("src", "tests", "examples")

LAYERS = (  # a module imports from its own layer, without cycles, and from those before it
    {"_types", "_opaque", "_trees", "_checks", "_noise", "_linalg", "_sides", "_triangles", "schedule", "checkpoints"},
    {"_recompute", "_autocast", "_widened", "logs"},
    {"_likelihood", "_elementwise", "_categorical", "_agreement", "likelihoods", "original_likelihoods", "_resolve"},
    {"qmodules", "kronecker", "covariances", "bases", "spiked", "families"},
    {"layers", "convolutions", "packed", "registry", "kernels", "pushforward", "capture", "blocks", "fisher"},
    {"auxiliary", "transform"},
    {"diagnostics", "batch", "operators", "conjugate", "nystrom", "inverse", "fisher_operator"},
    {"spectra", "examplewise", "laplace", "influence", "penalty"},
    {"curvature"},
    {"momentum"},
    {"descent", "warmup"},
    {"engine"},
    {"step"},
    {"entry", "original_checkpoint"},
    {"feed", "layer_watch", "watch", "left_gradient", "original_call"},
    {"optimizer"},
    {"estimate", "block_inverse", "masks", "selection"},
    {"pruning"},
    {"__init__"},
)
ORACLE = ({"_oracles"}, {"_oracle_step"}, {"reference"})  # the oracle shares no code with what it checks
ALONE = set().union(*ORACLE)
RANK = {name: rank for layers in (LAYERS, ORACLE) for rank, names in enumerate(layers) for name in names}


def imported(source: str) -> set[str]:
    """Return the modules of the package that a source imports, wherever in the source and in whatever form."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"fishleg_func.{node.module or ''}".rstrip(".") if node.level else (node.module or "")
            names = [f"{module}.{alias.name}" if module == "fishleg_func" else module for alias in node.names]
        else:
            continue
        found |= {
            name.split(".")[1] if "." in name else "__init__" for name in names if re.match(r"fishleg_func\b", name)
        }
    return found


def problems(sources: dict[str, str]) -> list[str]:
    """Return what breaks the order of layers, in words."""
    wrong = [f"{name} has no layer: add it to LAYERS" for name in sources if name not in RANK]
    edges = {name: imported(source) for name, source in sources.items()}
    for name, targets in edges.items():
        for target in sorted(targets):
            if target not in RANK:
                wrong.append(f"{name} imports {target}, which has no layer")
            elif name in ALONE and target not in ALONE:
                wrong.append(f"{name} must import nothing of the package, not {target}")
            elif target in ALONE and name not in ALONE and (name, target) != ("__init__", "reference"):
                wrong.append(f"{name} must not import {target}")
            elif (name, target) != ("__init__", "reference") and RANK[target] > RANK.get(name, 0):
                wrong.append(f"{name} imports {target}, which is above it")
    left = dict(edges)
    while ready := [name for name, targets in left.items() if not targets & left.keys()]:
        left = {name: targets for name, targets in left.items() if name not in ready}
    return [*wrong, *([f"imports go in a circle among {sorted(left)}"] if left else [])]


def package_sources() -> dict[str, str]:
    return {path.stem: path.read_text() for path in PACKAGE.rglob("*.py")}


def test_imports_go_one_way() -> None:
    sources = package_sources()
    assert sources.keys() == RANK.keys()
    assert problems(sources) == []


def test_the_parser_sees_the_imports_of_this_package() -> None:
    edges = {name: imported(source) for name, source in package_sources().items()}
    assert {"step", "entry", "reference", "likelihoods"} <= edges["__init__"]
    assert {"batch", "auxiliary", "_checks"} <= edges["step"]
    assert edges["reference"] == {"_oracles", "_oracle_step"}
    assert edges["_oracle_step"] == {"_oracles"}
    assert edges["_oracles"] == set()


@pytest.mark.parametrize(
    "source",
    [
        "from . import step",
        "from .step import FishLegStep",
        "import fishleg_func.step",
        "import fishleg_func.step as s",
        "from fishleg_func import step",
        "from fishleg_func.step import FishLegStep",
        "def late():\n    from .step import FishLegStep",
        "import typing\nif typing.TYPE_CHECKING:\n    from .step import FishLegStep",
    ],
)
def test_an_upward_import_is_noticed(source: str) -> None:
    assert imported(source) == {"step"}
    assert problems({"_types": source}) == ["_types imports step, which is above it"]


def test_other_breaks_of_the_order_are_noticed() -> None:
    assert problems({"_checks": "import torch\nimport fishleg_functional"}) == []
    assert problems({"novel": ""}) == ["novel has no layer: add it to LAYERS"]
    assert problems({"step": "from .novel import x"}) == ["step imports novel, which has no layer"]
    assert problems({"reference": "from ._checks import choice"}) == [
        "reference must import nothing of the package, not _checks"
    ]
    assert problems({"_oracles": "from . import step"}) == ["_oracles must import nothing of the package, not step"]
    assert problems({"reference": "from ._oracles import fisher"}) == []
    assert problems({"step": "from . import reference"}) == ["step must not import reference"]
    assert problems({"step": "from ._oracles import fisher"}) == ["step must not import _oracles"]
    circle = {"bases": "from .kronecker import Kronecker", "kronecker": "from .bases import KFAC"}
    assert problems(circle) == ["imports go in a circle among ['bases', 'kronecker']"]
    assert problems({"_types": "import fishleg_func"}) == ["_types imports __init__, which is above it"]


def python_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert len(lengths) > len(RANK)
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_nothing_is_left_to_do() -> None:
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert mark.search("# TO" + "DO: later")
    assert [str(path.relative_to(ROOT)) for path in python_files() if mark.search(path.read_text())] == []
