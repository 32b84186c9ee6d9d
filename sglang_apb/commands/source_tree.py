"""SGLang's source in a folder or a wheel. It is parsed and never imported: another version needs other packages."""

from __future__ import annotations

import ast
import copy
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import resolve_name
from pathlib import Path
from typing import TypeAlias

from sglang_apb.commands import CommandError

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_CALLED_OTHERWISE = ("staticmethod", "classmethod", "property")  # decorators that belong to a signature


@dataclass(frozen=True)
class Definition:
    """What a name of SGLang's stands for: a function, a class, or a statement that assigns to it."""

    module: Module
    qualname: str
    node: ast.stmt

    @property
    def path(self) -> str:
        return f"{self.module.name}.{self.qualname}"

    @property
    def name(self) -> str:
        return self.qualname.rpartition(".")[2]

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, Function)

    @property
    def is_abstract(self) -> bool:
        return "abstractmethod" in _decorators(self.node)

    @property
    def signature(self) -> list[str]:
        """How it is called: its kind, and its parameters, of which `x=` has a default. Of a class: its bases."""
        if isinstance(self.node, ast.ClassDef):
            return [ast.unparse(base) for base in self.node.bases]
        if not isinstance(self.node, Function):
            return ["a value"]
        kinds = [name for name in _decorators(self.node) if name in _CALLED_OTHERWISE]
        kinds += ["async"] if isinstance(self.node, ast.AsyncFunctionDef) else []
        return kinds + _parameters(self.node.args)

    @property
    def logic(self) -> str:
        """Equal for two sources that differ in comments, docstrings and formatting only."""
        node = copy.deepcopy(self.node)
        for part in ast.walk(node):
            if isinstance(part, (Function, ast.ClassDef)) and ast.get_docstring(part, clean=False) is not None:
                del part.body[0]
        return ast.dump(node)

    @property
    def lines(self) -> list[str]:
        return self.module.text.splitlines()[self.first_line - 1 : self.node.end_lineno]

    @property
    def first_line(self) -> int:
        return min([self.node.lineno, *(part.lineno for part in getattr(self.node, "decorator_list", ()))])


@dataclass(frozen=True)
class Module:
    """`names`: what the module defines, or the dotted path that it imports; `stars`: what it imports `*` from."""

    name: str
    file: str
    text: str
    names: dict[str, ast.stmt | str]
    stars: list[str]


class Tree:
    """`sglang`, in the folder or wheel `path`. Raises ValueError when it is not there."""

    def __init__(self, path: Path):
        self._root = _find_sglang(path)
        self._modules: dict[str, Module | None] = {}

    def is_module(self, path: str) -> bool:
        return self._module(path) is not None

    def find(self, path: str) -> Definition | None:
        """What a dotted path names: imports are followed, and the bases of a class searched for a method."""
        owner, _, name = path.rpartition(".")
        if not owner:
            return None
        module = self._module(owner)
        if module is None:
            return self.find_method([owner], name)
        found = module.names.get(name)
        if isinstance(found, ast.stmt):
            return Definition(module, name, found)
        imported = [f"{star}.{name}" for star in module.stars] if found is None else [found]
        return next(filter(None, (self.find(other) for other in imported if other != path)), None)

    def find_method(self, bases: Sequence[str], name: str) -> Definition | None:
        """The method `name` that a class inherits from `bases`, given by their dotted paths."""
        return next((method for method in self.methods(bases) if method.name == name), None)

    def methods(self, bases: Sequence[str]) -> Iterator[Definition]:
        """Those that a class with `bases` finds in them, first the ones that it finds first; also those overridden."""
        for parent in self._classes(bases):
            for statement in _statements(parent.node):
                if isinstance(statement, Function) and "overload" not in _decorators(statement):
                    yield Definition(parent.module, f"{parent.qualname}.{statement.name}", statement)

    def modules_defining(self, name: str) -> list[str]:
        """Modules of SGLang's server with a function, a method or a class `name`."""
        return self._places.get(name, [])

    def _classes(self, bases: Sequence[str]) -> list[Definition]:
        """`bases` and theirs, as far as they are SGLang's, in the order in which Python searches them."""
        found: list[Definition] = []
        for path in bases:
            base = self.find(path)
            if base is not None and isinstance(base.node, ast.ClassDef):
                module = base.module
                above = [absolute(part, module.names, module.name) for part in base.node.bases]
                found += [base, *self._classes(above)]
        # A base that two others share comes after both.
        last_first = {parent.path: parent for parent in reversed(found)}
        return list(reversed(last_first.values()))

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        package, *parts = name.split(".")
        if package != "sglang":
            return None
        as_folder = "/".join([*parts, "__init__.py"])
        for relative in (as_folder, "/".join(parts) + ".py"):
            file = self._root / relative
            if file.is_file():
                return _parse(name, f"sglang/{relative}", file.read_text(encoding="utf-8"), relative == as_folder)
        return None

    @cached_property
    def _places(self) -> dict[str, list[str]]:
        places: dict[str, list[str]] = {}
        for name, file in _python_files(self._root / "srt", "sglang.srt"):
            text = file.read_text(encoding="utf-8")
            for found in set(re.findall(r"^[ \t]*(?:async def|def|class) (\w+)", text, flags=re.MULTILINE)):
                places.setdefault(found, []).append(name)
        return places


def _find_sglang(path: Path) -> Path | zipfile.Path:
    """The folder `sglang` in `path`, or `path` itself."""
    candidates: list[Path | zipfile.Path] = [path / "sglang", path]
    if path.is_file() and zipfile.is_zipfile(path):
        candidates = [zipfile.Path(path) / "sglang"]
    for candidate in candidates:
        if (candidate / "srt" / "server_args.py").is_file():
            return candidate
    raise ValueError(
        f"{path} is neither a wheel of SGLang nor a folder with sglang/: get one with "
        "`pip download --no-deps sglang==VERSION`"
    )


def _python_files(folder: Path | zipfile.Path, package: str) -> Iterator[tuple[str, Path | zipfile.Path]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _python_files(entry, f"{package}.{entry.name}")
        elif entry.name.endswith(".py"):
            yield package if entry.name == "__init__.py" else f"{package}.{entry.name[:-3]}", entry


def _parse(name: str, file: str, text: str, is_package: bool) -> Module:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise CommandError(f"{file}:{error.lineno} is not this Python's language: use a newer Python") from error
    module = Module(name, file, text, names={}, stars=[])
    package = name if is_package else name.rpartition(".")[0]
    for statement in _statements(tree):
        # Of two with one name the first counts: what follows `except ImportError` or `else` is a makeshift.
        for key, value in _bindings(statement, package):
            if key == "*":
                module.stars.append(str(value).removesuffix(".*"))
            else:
                module.names.setdefault(key, value)
    return module


def _bindings(statement: ast.stmt, package: str) -> Iterator[tuple[str, ast.stmt | str]]:
    """Names that a statement of a module in `package` binds, each with the statement or the path that it imports."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            if "overload" not in _decorators(statement):
                yield statement.name, statement
        case ast.Assign(targets=targets):
            yield from ((part.id, statement) for part in targets if isinstance(part, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name, statement
        case ast.Import() | ast.ImportFrom():
            yield from imports(statement, package)


def imports(statement: ast.AST, package: str = "") -> Iterator[tuple[str, str]]:
    """The names that an import statement of a module in `package` binds, each with its dotted path."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            first = alias.name.partition(".")[0]
            yield (alias.asname, alias.name) if alias.asname else (first, first)
    elif isinstance(statement, ast.ImportFrom):
        origin = resolve_name("." * statement.level + (statement.module or ""), package)
        for alias in statement.names:
            yield alias.asname or alias.name, f"{origin}.{alias.name}"


def absolute(expression: ast.expr, names: Mapping[str, ast.stmt | str], module: str = "") -> str:
    """The dotted path of `Name`, `package.Name` or `Name[...]` in a module where `names` are bound."""
    if isinstance(expression, ast.Subscript):
        expression = expression.value
    first, dot, rest = ast.unparse(expression).partition(".")
    bound = names.get(first)
    return (bound if isinstance(bound, str) else f"{module}.{first}") + dot + rest


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module or class, also under `if`, `try` and `with`, but not those of what it defines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _statements(child)


def _decorators(node: ast.AST) -> list[str]:
    """By their last names: `abstractmethod` for `@abc.abstractmethod`."""
    return [ast.unparse(part).rpartition(".")[2] for part in getattr(node, "decorator_list", ())]


def _parameters(arguments: ast.arguments) -> list[str]:
    plain = copy.deepcopy(arguments)
    for part in ast.walk(plain):
        if isinstance(part, ast.arg):
            part.annotation = None
    default = ast.Name("")
    plain.defaults = [default for _ in plain.defaults]
    plain.kw_defaults = [given and default for given in plain.kw_defaults]
    text = ast.unparse(plain)
    return text.split(", ") if text else []
