"""Which tokens of a block are worth handing on: one file a selector, imported when chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sglang_apb.selection.table import PLACES

if TYPE_CHECKING:
    from sglang_apb.selection.base import Selector


def create(name: str) -> Selector:
    """The selector `name`, one of `table.SELECTORS`."""
    module, attribute = PLACES[name]
    return getattr(import_module(module), attribute)()
