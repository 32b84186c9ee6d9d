"""Prompts whose beginning a prefill server has in its prefix cache: found, sent ahead of their batch, and right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import generate
from conftest import Plain, cluster, running

pytestmark = pytest.mark.server

# SGLang sends a cached prefix early on GPUs. With overlapping batches it orders that by a CUDA event, so without them
# here: what this test is about is the early send.
EARLY_SEND = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
ASKED = (300, 1000, 300, 1300, 3000, 1000, 3000, 1300)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_prefix_that_is_sent_early_ends_no_server(
    num_ranks: int, plain: Plain, log_dirs: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact prompts are found again; sparse ones (3,000 tokens) are not, and own pages keep their count."""
    monkeypatch.setenv(EARLY_SEND, "1")
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")  # a slot that is freed twice ends the server
    settings = ("--prefill-backend-config", '{"passing": "all", "min_tokens": 2000}')
    service = cluster(plain.model, next(log_dirs), num_ranks, *settings, arguments=("--disable-overlap-schedule",))
    with running(service) as url:
        for length in ASKED:
            answer = generate(url, plain.prompts[length])
            assert answer.token_ids == plain.answers[length].token_ids, length
        prefill = service.groups[0].log_path.read_text()
    assert "#cached-token: 299" in prefill, "no prompt was found again"
