"""`sglang-apb doctor`: whether this machine and this installation can do what the options promise."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from sglang_apb.commands import CommandError, compare
from sglang_apb.commands.source_tree import Tree
from sglang_apb.commands.targets import patch_modules
from sglang_apb.patches._patch import SGLANG_VERSION, PatchError

HELP = "check versions, GPUs, plugin entry points and patches"
PLUGINS = "sglang.srt.plugins"
ENTRY_POINTS = {PLUGINS: "apb", "sglang.srt.platforms": "portable_cpu"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` None: told for information only."""

    name: str
    value: str
    ok: bool | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare",
        type=_tree,
        metavar="WHEEL_OR_FOLDER",
        help="say instead what is another in this SGLang than in the installed one, of all that the plugin depends on",
    )
    parser.add_argument("--diff", action="store_true", help="with --compare: also print how each of them changed")


def _tree(path: str) -> Tree:
    try:
        return Tree(Path(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace) -> int:
    if args.compare is not None:
        return compare.run(args.compare, with_diffs=args.diff)
    if args.diff:
        raise CommandError("--diff needs --compare: it prints how what is compared has changed")
    findings = [*_versions(), *_gpus(), *_entry_points(), *_patches()]
    for finding in findings:
        mark = {True: "ok", False: "WRONG", None: ""}[finding.ok]
        print(f"{finding.name:<28} {finding.value:<60} {mark}".rstrip())
    return 1 if any(finding.ok is False for finding in findings) else 0


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for name, wanted in {
        "torch": None,
        "sglang": SGLANG_VERSION,
        "sglang-router": None,
        "pyzmq": None,
    }.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "not installed", ok=False)
            continue
        ok = None if wanted is None else found == wanted
        yield Finding(name, found if ok is not False else f"{found}, but sglang-apb knows {wanted}", ok)


def _gpus() -> Iterator[Finding]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Finding("GPUs", ", ".join(names) or "none: the portable CPU platform serves")


def _entry_points() -> Iterator[Finding]:
    for group, name in ENTRY_POINTS.items():
        found = any(point.name == name for point in entry_points(group=group))
        chosen = os.environ.get("SGLANG_PLUGINS", "").strip()
        if chosen and group == PLUGINS and name not in [part.strip() for part in chosen.split(",")]:
            yield Finding(f"entry point {name}", f"SGLANG_PLUGINS={chosen} leaves it out", ok=False)
        else:
            yield Finding(f"entry point {name}", f"in {group}" if found else f"not in {group}: reinstall", found)


def _patches() -> Iterator[Finding]:
    """One finding a patch module, with the first target that is not the known one."""
    for name, targets in patch_modules():
        yield _check(f"patches {name}", targets)


def _check(name: str, targets: tuple[Any, ...]) -> Finding:
    try:
        for patch in targets:
            patch.check()
    except PatchError as error:
        return Finding(name, str(error), ok=False)
    return Finding(name, f"{len(targets)} of {len(targets)} targets as known", ok=True)
