"""No file of the package needs itself: imports have no circle, those inside functions and for type checks included.
And no folder of it is left out of what is installed.
"""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
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
