"""What the plugin's own files depend on in SGLang: read off the patches and off the source of our modules."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sglang_apb
import sglang_apb.patches as patches
from sglang_apb.commands.source_tree import Definition, Tree, absolute, imports

_ROOTS = ("sglang.", "sglang_apb.")


@dataclass(frozen=True)
class Target:
    """What `file` of ours needs: a dotted path of SGLang's or, with `bases`, a method that a class has from them."""

    file: str
    path: str
    bases: tuple[str, ...] = ()

    def find(self, tree: Tree) -> Definition | None:
        return tree.find_method(self.bases, self.path) if self.bases else tree.find(self.path)


@dataclass(frozen=True)
class Subclass:
    """A class of ours with bases of SGLang's. `used`: names that it takes from `self` or `super()`."""

    file: str
    bases: tuple[str, ...]
    methods: frozenset[str]
    used: frozenset[str]


@dataclass(frozen=True)
class OurFile:
    """A module of the plugin. `imports` are the names that it has from SGLang, `own` those from the plugin, each with
    its dotted path.
    """

    name: str
    tree: ast.Module
    imports: tuple[tuple[str, str], ...]
    own: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, name: str, path: Path) -> OurFile:
        tree = ast.parse(path.read_text())
        found = sorted({pair for node in ast.walk(tree) for pair in imports(node)})
        of_sglang, own = (tuple(pair for pair in found if pair[1].startswith(root)) for root in _ROOTS)
        return cls(name, tree, of_sglang, own)

    def subclasses(self) -> Iterator[Subclass]:
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            paths = [absolute(base, dict(self.imports + self.own)) for base in node.bases]
            if bases := tuple(path for path in paths if path.startswith("sglang.")):
                parts = [node, *(_class_of_ours(path) for path in paths if path.startswith("sglang_apb."))]
                methods, used = (frozenset(name for part in parts for name in of(part)) for of in (_methods, _used))
                yield Subclass(self.name, bases, methods, used)

    def imported(self, known: Tree) -> Iterator[str]:
        """Paths of what it imports, or takes from a module that it imports."""
        for name, path in self.imports:
            if known.is_module(path):
                yield from (f"{path}.{attribute}" for attribute in _attributes(self.tree, name))
            else:
                yield path


def patch_modules() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Modules of `patches/` by name, each with its patches; those without any are left out."""
    for info in pkgutil.iter_modules(patches.__path__):
        if targets := getattr(import_module(f"{patches.__name__}.{info.name}"), "PATCHES", ()):
            yield info.name, targets


def our_files() -> list[OurFile]:
    """`patches/` stands beside the package in the checkout, and is a part of it where it is installed."""
    files: dict[Path, str] = {}
    for package in (sglang_apb, patches):
        root = Path(package.__path__[0])
        files |= {path: str(path.relative_to(root.parent)) for path in root.rglob("*.py")}
    return [OurFile.read(name, path) for path, name in sorted(files.items(), key=lambda item: item[1])]


def patched(known: Tree) -> Iterator[Target]:
    for name, targets in patch_modules():
        for path in (patch.target for patch in targets):
            # A method that comes from Python's own class (`Enum._missing_`) stands and falls with the class.
            yield Target(f"patches/{name}.py", path if known.find(path) else path.rpartition(".")[0])


def inherited(subclass: Subclass, known: Tree) -> Iterator[Target]:
    """Methods of the bases that our class overrides, calls or hands on."""
    for name in subclass.methods | subclass.used:
        if known.find_method(subclass.bases, name):
            yield Target(subclass.file, name, subclass.bases)


def imported(file: OurFile, known: Tree, other: Tree) -> Iterator[Target]:
    """Functions. Of classes and values, in which something is always new, only those that are not there."""
    for path in file.imported(known):
        found = known.find(path)
        if found is None or found.is_function or not other.find(path):
            yield Target(file.name, path)


def _class_of_ours(path: str) -> ast.ClassDef:
    """One from which a class of ours has what it overrides of SGLang's."""
    module, _, name = path.rpartition(".")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    tree = ast.parse(Path(spec.origin).read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _methods(node: ast.ClassDef) -> Iterator[str]:
    return (part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _used(node: ast.ClassDef) -> Iterator[str]:
    for owner in ("self", "super()"):
        yield from _attributes(node, owner)


def _attributes(node: ast.AST, owner: str) -> Iterator[str]:
    """Every `name` of `owner.name` in `node`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) == owner:
            yield part.attr
