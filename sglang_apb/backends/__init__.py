"""Prefill methods by the name given to `--prefill-backend`. A method is one file; it is imported when chosen."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_BACKENDS = {"apb": ("sglang_apb.backends.apb", "ApbBackend")}
NAMES = tuple(_BACKENDS)


def check_name(name: str) -> None:
    """Raises ValueError, with the known names, when there is no such method."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown prefill backend {name!r}; known: {', '.join(NAMES)}")


def load(name: str) -> Any:
    """The class of the method `name` (see `base.PrefillBackend`)."""
    check_name(name)
    module, attribute = _BACKENDS[name]
    return getattr(import_module(module), attribute)
