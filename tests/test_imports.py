"""No file of the package needs itself: imports have no circle, those inside functions and for type checks included.
No folder of it is left out of what is installed. And what the tests for GPUs call of its modules is there.
"""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Where each package's files are (pyproject.toml).
FOLDERS = {"sglang_apb.patches": "patches", "sglang_apb.kernels": "kernels/src", "sglang_apb": "sglang_apb"}


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.setdefault(".".join((package, *parts)).removesuffix(".__init__"), path)
    return found


def imported(name: str, source: str, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (module for module in inside if module in known)
            if any(module not in known for module in inside) and node.module != name:
                yield node.module


def test_imports_have_no_circle() -> None:
    known = modules()
    assert len(known) > 100
    graph = {name: set(imported(name, path.read_text(), known)) for name, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_a_circle_is_found() -> None:
    known = {"a": Path(), "b": Path()}
    sources = {"a": "def f():\n    from b import g", "b": "import a"}
    graph = {name: set(imported(name, source, known)) for name, source in sources.items()}
    assert graph == {"a": {"b"}, "b": {"a"}}


def test_every_folder_is_installed() -> None:
    """An editable installation has them all, a wheel those that are named."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert sorted(named) == sorted(there)


def called(source: str, known: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Each module that is imported from its package, and what is called of it by its name."""
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and names.get(node.value.id) in known:
            yield names[node.value.id], node.attr


def test_what_the_tests_for_gpus_call_is_there() -> None:
    """They run nowhere else, and would keep a name that has gone."""
    known = modules()
    calls = {
        (path.name, module, name)
        for path in (ROOT / "tests").glob("test_gpu*.py")
        for module, name in called(path.read_text(), known)
    }
    assert calls
    assert not [call for call in sorted(calls) if not hasattr(import_module(call[1]), call[2])]
