"""`sglang-apb doctor --compare`: what became, in another SGLang, of the functions that the plugin was written for.

They are what patches hook, what our classes override, inherit and use, and what our modules import.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from sglang_apb.commands import CommandError, targets
from sglang_apb.commands.source_tree import Definition, Tree
from sglang_apb.commands.targets import Subclass, Target
from sglang_apb.patches._patch import SGLANG_VERSION


class Verdict(Enum):
    """Worst first, as the table says it."""

    GONE = "gone"
    NEW = "new"
    SIGNATURE = "signature changed"
    SOURCE = "source changed"
    EQUAL = "equal"


# The summary's words, in its order.
_COUNTED = {
    Verdict.EQUAL: "equal",
    Verdict.SOURCE: "changed in source",
    Verdict.SIGNATURE: "in signature",
    Verdict.NEW: "new",
    Verdict.GONE: "gone",
}
# A name that more modules define is no hint at where a function went.
_MAX_PLACES = 3
_DOTS = "..."


@dataclass(frozen=True)
class Row:
    """One target of `file`; `detail` and `diff` may be empty."""

    file: str
    path: str
    verdict: Verdict
    detail: str = ""
    diff: str = ""


def run(other: Tree, *, with_diffs: bool) -> int:
    """Prints a table, and returns 0 when every target is there and called as it is in the installed SGLang, else 1."""
    rows = compare(_installed(), other)
    for file, of_file in groupby(rows, key=lambda row: row.file):
        print(file)
        for row in of_file:
            print(f"  {row.verdict.value:<18} {row.path.removeprefix('sglang.srt.')} {row.detail}".rstrip())
    if with_diffs:
        for diff in {row.path: row.diff for row in rows if row.diff}.values():
            print(diff)
    counts = Counter(row.verdict for row in rows)
    told = ", ".join(f"{counts[verdict]} {words}" for verdict, words in _COUNTED.items() if counts[verdict])
    print(f"{len(rows)} targets: {told}")
    return 0 if set(counts) <= {Verdict.EQUAL, Verdict.SOURCE} else 1


def compare(known: Tree, other: Tree) -> list[Row]:
    """A row for each target, in the order of our files, and of a file's the worst first."""
    rows = {(row.file, row.path): row for row in _rows(known, other)}
    worst_first = list(Verdict)
    return sorted(rows.values(), key=lambda row: (row.file, worst_first.index(row.verdict), row.path))


def _rows(known: Tree, other: Tree) -> Iterator[Row]:
    for target in targets.patched(known):
        yield _judge(target, known, other)
    for file in targets.our_files():
        for target in targets.imported(file, known, other):
            yield _judge(target, known, other)
        for subclass in file.subclasses():
            for target in targets.inherited(subclass, known):
                yield _judge(target, known, other)
            yield from _new_methods(subclass, known, other)


def _judge(target: Target, known: Tree, other: Tree) -> Row:
    before, after = target.find(known), target.find(other)
    if before is None:
        return Row(target.file, target.path, Verdict.GONE, "(not in the installed SGLang)")
    path = before.path if target.bases else target.path
    if after is None:
        return Row(target.file, path, Verdict.GONE, _find_hint(before, other))
    if before.signature != after.signature:
        arrow = _arrow(before.signature, after.signature)
        return Row(target.file, path, Verdict.SIGNATURE, arrow, _diff(before, after))
    if before.logic != after.logic:
        return Row(target.file, path, Verdict.SOURCE, diff=_diff(before, after))
    return Row(target.file, path, Verdict.EQUAL)


def _new_methods(subclass: Subclass, known: Tree, other: Tree) -> Iterator[Row]:
    """Those that our class has to define, and those that it overrides without being meant to: a name taken twice."""
    seen: set[str] = set()
    for method in other.methods(subclass.bases):
        if method.name not in seen and known.find_method(subclass.bases, method.name) is None:
            if method.name in subclass.methods:
                yield Row(subclass.file, method.path, Verdict.NEW, "(ours has the same name)")
            elif method.is_abstract:
                yield Row(subclass.file, method.path, Verdict.NEW, "(abstract, and ours does not define it)")
        seen.add(method.name)


def _find_hint(gone: Definition, other: Tree) -> str:
    """Where the other SGLang has something of the name of a function, or of the class that it has gone with."""
    owner, _, name = gone.path.rpartition(".")
    if gone.qualname != name and other.find(owner) is None:
        name = owner.rpartition(".")[2]
    places = other.modules_defining(name)
    if name.startswith("__") or not 0 < len(places) <= _MAX_PLACES:
        return ""
    return f"({name} is defined in {', '.join(places)})"


def _arrow(before: list[str], after: list[str]) -> str:
    """Two signatures, with dots for the parameters that they have in common."""
    sides: tuple[list[str], list[str]] = ([], [])
    for tag, *bounds in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        parts = before[slice(*bounds[:2])], after[slice(*bounds[2:])]
        for side, part in zip(sides, parts, strict=True):
            side += [_DOTS] * (side[-1:] != [_DOTS]) if tag == "equal" else part
    return " -> ".join(f"({', '.join(side)})" for side in sides)


def _diff(before: Definition, after: Definition) -> str:
    """Of the text as it is written, comments included."""
    names = (f"{part.module.file}:{part.first_line} {part.qualname}" for part in (before, after))
    return "\n".join(difflib.unified_diff(before.lines, after.lines, next(names), next(names), lineterm=""))


def _installed() -> Tree:
    try:
        found = version("sglang")
    except PackageNotFoundError:
        found = "no version"
    if found != SGLANG_VERSION:
        raise CommandError(
            f"--compare starts from SGLang {SGLANG_VERSION}, which the plugin was written for, and {found} is "
            f"installed: pip install sglang=={SGLANG_VERSION}"
        )
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None, "sglang has metadata, and no package"
    return Tree(Path(spec.origin).parent)
