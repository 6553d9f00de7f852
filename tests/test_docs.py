"""What the documentation says is true: names, parameters, commands and code, and the tools find nothing to complain."""

import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Set
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = "fishleg_func"
MODULES = (PACKAGE, *(f"{PACKAGE}.{name}" for name in ("likelihoods", "families", "pruning", "logs", "reference")))


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# --- public names are documented names ---


def exported(module: ModuleType) -> list[str]:
    """``__all__`` or, without one, what the module itself defines; modules and dunders are left out."""
    defined = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", defined)
    return [name for name in names if not (name.startswith("_") or isinstance(getattr(module, name), ModuleType))]


def public() -> dict[str, Any]:
    """Qualified name -> object, for all public modules."""
    modules = [importlib.import_module(name) for name in MODULES]
    return {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in exported(module)}


def documented(text: str) -> list[str]:
    """Names that the autodoc directives of ``text`` document."""
    return re.findall(r"^\.\. auto(?:function|class|data|exception):: (\S+)$", text, flags=re.MULTILINE)


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def name_differences(public: dict[str, Any], documented: list[str]) -> tuple[set[str], set[str]]:
    """Public names without an entry, and entries that are not public. One object under two names needs one entry."""
    entries = {name: id(resolve(name)) for name in documented}
    objects = {name: id(value) for name, value in public.items()}
    missing = {name for name, x in objects.items() if x not in entries.values()}
    return missing, {name for name, x in entries.items() if x not in objects.values()}


def test_public_names_are_the_documented_names() -> None:
    assert name_differences(public(), documented(read("docs/api.md"))) == (set(), set())


def test_name_differences_are_seen() -> None:
    names_of_json = {name: resolve(name) for name in ("json.loads", "json.load")}
    names = documented("text\n.. autofunction:: json.dumps\n\n.. autofunction:: json.load\n   :noindex:\n")
    assert name_differences(names_of_json, names) == ({"json.loads"}, {"json.dumps"})


# --- every parameter is described ---


def described_parameters(docstring: str | None) -> set[str]:
    """Names in the Args or Attributes section of a Google docstring."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)*)", f"{docstring or ''}\n", flags=re.MULTILINE)
    entries = re.findall(r"^    ([*\w][^:(\n]*?)(?: \(.*?\))?:(?:\s|$)", "\n".join(sections), flags=re.MULTILINE)
    return {name.strip(" *`") for entry in entries for name in entry.split(",")}


def commented_fields(cls: type) -> set[str]:
    """Fields of a NamedTuple or dataclass with a comment on their line."""
    return set(re.findall(r"^    (\w+): .*#", textwrap.dedent(inspect.getsource(cls)), flags=re.MULTILINE))


def mentioned_in_prose(value: Any) -> set[str]:
    """Names that an oracle's own docstring or, once for all of them, that of its module explains without a section."""
    if value.__module__ != f"{PACKAGE}.reference":
        return set()
    return set(re.findall(r"``(\w+)``", f"{sys.modules[value.__module__].__doc__} {inspect.getdoc(value)}"))


def undescribed(function: Any, docstring: str | None, also: Set[str] = frozenset()) -> set[str]:
    if not docstring:
        return {"anything"}
    names = set(inspect.signature(function).parameters) - {"self", "cls"}
    return names - described_parameters(docstring) - also


def callables(name: str, value: Any) -> Iterator[tuple[str, set[str]]]:
    """The callable itself and, for a class, its own public methods: (name, what its docstring does not describe).

    A method that overrides one and inherits its docstring is not looked at again.
    """
    if inspect.isfunction(value):
        yield name, undescribed(value, inspect.getdoc(value), mentioned_in_prose(value))
    if not inspect.isclass(value):
        return
    if not getattr(value, "_is_protocol", False):
        is_record = dataclasses.is_dataclass(value) or issubclass(value, tuple)
        docstring = f"{inspect.getdoc(value) or ''}\n\n{inspect.getdoc(value.__init__) or ''}".strip()
        yield name, undescribed(value, docstring, commented_fields(value) if is_record else frozenset())
    for method, function in vars(value).items():
        if not inspect.isfunction(function) or (method.startswith("_") and method != "__call__"):
            continue
        inherited = any(getattr(vars(base).get(method), "__doc__", None) for base in value.__mro__[1:])
        if function.__doc__ or not inherited:
            yield f"{name}.{method}", undescribed(function, function.__doc__ and inspect.cleandoc(function.__doc__))


def test_every_parameter_is_described() -> None:
    objects = {id(value): (name, value) for name, value in public().items()}  # one object may have two names
    checked = dict(pair for name, value in objects.values() for pair in callables(name, value))
    assert len(checked) > 20
    lacking = [f"{name} does not describe {', '.join(sorted(lacks))}" for name, lacks in checked.items() if lacks]
    assert not lacking, "\n".join(lacking)


def test_undescribed_parameters_are_seen() -> None:
    def function(a: int, b: int, c: int, *rest: int, d: int, e: int) -> None:
        """Do it.

        Args:
            a: First. Not what is
                called c: that is another one.
            b (int): Second,
                in two lines.
            *rest, d: More.

        Returns:
            e: Nothing.
        """

    assert undescribed(function, inspect.getdoc(function)) == {"c", "e"}
    assert undescribed(function, "Do it.") == {"a", "b", "c", "rest", "d", "e"}
    assert undescribed(function, None) == {"anything"}

    @dataclasses.dataclass
    class Record:
        a: int  # described
        b: int

        def method(self, x: int) -> None:
            """Do it."""

        def undocumented(self) -> None: ...

    class Child(Record):
        def method(self, x: int) -> None: ...

    lacking = {"Record": {"b"}, "Record.method": {"x"}, "Record.undocumented": {"anything"}}
    assert dict(callables("Record", Record)) == lacking
    assert dict(callables("Child", Child)).keys() == {"Child"}


# --- commands and code of the README ---


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def jobs(text: str) -> dict[str, list[str]]:
    """Commands of tox.ini by job; the arguments that a user may add are dropped."""
    found: dict[str, list[str]] = {}
    for job, command in re.findall(r"^    (\w+): (python .*)$", text, flags=re.MULTILINE):
        found.setdefault(job, []).append(command.removesuffix(" {posargs}"))
    return found


def test_parsers_of_commands() -> None:
    assert blocks("```bash\na\nb\n```\n```python\nc\n```\n", "bash") == ["a\nb\n"]
    assert commands("#!/bin/sh\n# why\n\na && b\nc\n") == ["a && b", "c"]
    text = "commands =\n    a: python -m x .\n    a: python y {posargs}\n    b: python z\n    b: not python\n"
    assert jobs(text) == {"a": ["python -m x .", "python y"], "b": ["python z"]}


def test_readme_opens_with_the_commands_that_ci_and_tox_run() -> None:
    opening = read("README.md").split("## ")[0]
    demo, test = commands(blocks(opening, "bash")[0])
    assert commands(read(".ci/run")) == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', test]

    *setup, run = test.split(" && ")
    assert demo.split(" && ")[:-1] == setup
    of_tox = jobs(read("tox.ini"))
    assert [f".venv/bin/{command}" for command in of_tox["demo"] + of_tox["tests"]] == [demo.split(" && ")[-1], run]
    torch_pin = re.search(r"torch==\S+", test)
    assert torch_pin is not None and f"deps = {torch_pin[0]}\n" in read("tox.ini")


def test_code_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler traces in full but generates no code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    namespace: dict[str, Any] = {}
    text = read("README.md")
    with torch.random.fork_rng():
        for block in blocks(text, "python"):
            above = text[: text.index(block)].count("\n")  # so that a traceback names the line of the page
            exec(compile("\n" * above + block, "README.md", "exec"), namespace)
    assert torch.isfinite(namespace["loss"])
    assert "0.weight" in capsys.readouterr().out  # the report


# --- the tools ---


@pytest.mark.parametrize("job", ["lint", "types", "docs"])
def test_tool_finds_nothing(job: str) -> None:
    for command in jobs(read("tox.ini"))[job]:
        _, *arguments = shlex.split(command)
        result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
