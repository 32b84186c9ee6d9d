"""Which tokens of a block are worth handing on: one file a selector, imported when chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_apb.selection.base import Selector

_SELECTORS = {
    "query": ("sglang_apb.selection.query", "QuerySelector"),
    "key_diff": ("sglang_apb.selection.key_diff", "KeyDiffSelector"),
}
SELECTORS = tuple(_SELECTORS)


def create(name: str) -> Selector:
    """The selector `name`, one of SELECTORS."""
    module, attribute = _SELECTORS[name]
    return getattr(import_module(module), attribute)()
