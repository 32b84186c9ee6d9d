"""The selectors that there are: a line here and a file beside this one make another."""

from __future__ import annotations

# Name -> where it is, imported when chosen.
PLACES = {
    "query": ("sglang_apb.selection.query", "QuerySelector"),
    "key_diff": ("sglang_apb.selection.key_diff", "KeyDiffSelector"),
}
SELECTORS = tuple(PLACES)
