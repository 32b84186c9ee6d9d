"""Requests that wait for KV memory on a decode server of several ranks, whose prefill server is gone meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking import prompts
from conftest import cluster, running, thorough
from halves import ask_half, end_hog, server_of, start_hog
from test_server_faults import PROMISE_S, schedulers, stopped
from transfer_peers import wait_for

SHORT, LONG = 300, 2200
# Decode's pool: holds the long prompt, or one that may grow by HOG_TOKENS, but not both.
DECODE_TOKENS, HOG_TOKENS = 3000, 2200


@thorough
@pytest.mark.server
def test_all_decode_ranks_hear_at_once_that_prefill_is_gone(
    tiny: Callable[[str], Path], log_dirs: Iterator[Path]
) -> None:
    """Each notices it by itself, and SGLang polls such requests only when one has failed: alone, a rank hangs."""
    model = tiny("LlamaForCausalLM")
    short, long = prompts(model, (SHORT, LONG))
    decode_arguments = ("--tp", "2", "--max-total-tokens", str(DECODE_TOKENS))
    service = cluster(model, next(log_dirs), 1, decode_arguments=decode_arguments)
    with running(service):
        prefill, decode = server_of(service, 1, "prefill"), server_of(service, 2, "decode")
        (rank,) = schedulers(service, "prefill")
        for attempt in range(3):
            hog = start_hog(decode, prefill, short, HOG_TOKENS, room=2 * attempt + 1)
            waiting = ask_half(decode, prefill, long, 8, room=2 * attempt + 2)
            assert wait_for(lambda: decode.loads()["num_waiting_reqs"] > 0, 60), waiting.text
            time.sleep(1)
            assert waiting.is_alive() and hog.is_alive(), waiting.text + hog.text
            with stopped(rank):
                waiting.join(PROMISE_S + 1)
                assert not waiting.is_alive() and "Lost the connection to prefill rank" in waiting.text, waiting.text
            end_hog(decode)
            hog.join(10)
            assert not hog.is_alive(), "the decode server hangs"
            pair = [ask_half(server, prefill, long, 8, room=100 + attempt) for server in (decode, prefill)]
            for half in pair:
                half.join(60)
                assert half.tokens is not None, half.text
