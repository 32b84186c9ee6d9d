"""What a patch on SGLang is here, and how a set of them is checked and applied."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

SGLANG_VERSION = "0.5.23"


class PatchError(RuntimeError):
    """SGLang is not the one that the patches were written against."""


def check_version() -> None:
    """Raises PatchError when another SGLang is installed than the known one.

    A hook that no longer fits may be accepted and never run: whether patches can be applied says too little.
    """
    if version("sglang") != SGLANG_VERSION:
        raise PatchError(
            f"sglang-apb knows SGLang {SGLANG_VERSION} and no other, and {version('sglang')} is installed: its options "
            f"are not there; install sglang=={SGLANG_VERSION}."
        )


@dataclass(frozen=True)
class Patch:
    """One hook on one function of SGLang.

    `target` is the dotted path of the function, `parameters` its parameter names as the hook knows them (None where
    the hook passes all of them on unread), `kind` one of "before", "after", "around", "replace" (SGLang's `HookType`),
    `hook` our function.
    """

    target: str
    kind: str
    parameters: tuple[str, ...] | None
    hook: Callable[..., Any]

    def check(self) -> None:
        """Raises PatchError when the target is missing or takes other parameters than the hook expects."""
        try:
            function = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError, ValueError) as error:
            raise PatchError(_altered_sglang(f"{self.target} does not exist")) from error
        plain = inspect.unwrap(getattr(function, "__func__", function))
        found = tuple(inspect.signature(plain).parameters)
        if self.parameters is not None and found != self.parameters:
            raise PatchError(_altered_sglang(f"{self.target} takes {found}, not {self.parameters}"))

    def is_in_place(self) -> bool:
        """Whether a call of the target comes to the hook: SGLang's wrappers hold theirs, and know what they wrap."""
        function = pkgutil.resolve_name(self.target)
        while function is not None and not _holds(function, self.hook):
            function = getattr(function, "__wrapped__", None)
        return function is not None


# What this process has put in place: SGLang's registry says of a target only that some plugin has hooked it.
_applied: set[tuple[str, Callable[..., Any]]] = set()


def apply(patches: Iterable[Patch]) -> None:
    """Checks every patch, then puts its hook in place, around those of other plugins. Applying one twice is a no-op.

    Raises PatchError: SGLang's registry itself only logs a hook that could not be applied, and the server
    would then run something else than was asked for.
    """
    new = [patch for patch in patches if (patch.target, patch.hook) not in _applied]
    for patch in new:
        patch.check()
    for patch in new:
        _put_in_place(patch)
        _applied.add((patch.target, patch.hook))


def _put_in_place(patch: Patch) -> None:
    """By SGLang's registry, but past its list of targets: it takes up each once, so that of two plugins that hook one,
    the second would not run.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    try:
        HookRegistry._apply_target(patch.target, [(HookType(patch.kind), patch.hook, HookSource("apb", "sglang-apb"))])
    except Exception as error:
        raise PatchError(_altered_sglang(f"could not patch {patch.target} ({error})")) from error
    if not patch.is_in_place():
        raise PatchError(_altered_sglang(f"could not patch {patch.target}"))


def _holds(function: Any, hook: Callable[..., Any]) -> bool:
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that nothing was put into
            if cell.cell_contents is hook:
                return True
    return False


def _altered_sglang(what: str) -> str:
    return (
        f"{what} in the installed SGLang {version('sglang')}, of which sglang-apb knows {SGLANG_VERSION} as it was "
        f"released: install sglang=={SGLANG_VERSION} anew, or remove the sglang-apb options from the command line."
    )
