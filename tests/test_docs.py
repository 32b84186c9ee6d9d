"""The map of the code names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT, ROOT / "sglang_apb", ROOT / "docs")


@pytest.mark.parametrize(
    "document", ["README.md", "docs/architecture.md", "docs/sglang.md", "docs/transfer.md", "docs/cluster.md"]
)
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md))`", text))
    named |= set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
    # Paths inside SGLang are given as such, and a few are the reader's own to make.
    ours = {name for name in named if not name.startswith(("/", "sglang/", "v1/", ".", "http"))}
    assert ours, f"{document} names no file"
    missing = sorted(name for name in ours if not any((place / name).exists() for place in PLACES))
    assert not missing, f"{document} names what is not there: {missing}"
