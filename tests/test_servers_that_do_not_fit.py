"""Two servers that cannot work together say so, at once, and go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import FLOAT32, next_port

from sglang_apb.commands.servers import LocalCluster, is_up
from sglang_apb.transfer.directory import Lookup


@pytest.mark.server
def test_different_models_are_refused_with_both_names(tiny: Callable[[str], Path], log_dirs: Iterator[Path]) -> None:
    port = next_port()
    service = LocalCluster(
        str(tiny("LlamaForCausalLM")),
        port=port,
        log_dir=next(log_dirs),
        sp_size=1,
        arguments=FLOAT32,
        decode_arguments=("--model-path", str(tiny("Qwen2ForCausalLM"))),
    )
    router, prefill, decode = (f"http://127.0.0.1:{port + offset}" for offset in range(3))

    def ask() -> requests.Response:
        body = {"model": "default", "prompt": "Hello", "max_tokens": 2}
        return requests.post(f"{router}/v1/completions", json=body, timeout=60)

    with service:
        deadline = time.monotonic() + 600
        while not is_up(router) or ask().status_code == 503:  # the router does not know both servers yet
            service.check()
            assert time.monotonic() < deadline, f"servers did not come up; logs: {service.groups[0].log_path.parent}"
            time.sleep(0.5)
        for _ in range(2):
            started = time.monotonic()
            answer = ask()
            assert not answer.ok
            assert "The prefill server runs LlamaForCausalLM" in answer.text
            assert "the decode server runs Qwen2ForCausalLM" in answer.text
            assert time.monotonic() - started < 20, "that is SGLang's timeout, not a refusal"
        assert is_up(prefill) and is_up(decode)


def bootstrap_server(kind: type, port: int) -> Any:
    """SGLang's or our bootstrap server of a prefill server with one rank, which has registered."""
    server = kind("127.0.0.1", port)
    server.attn_tp_size = server.attn_cp_size = server.pp_size = server.dp_size = server._registered_count = 1
    server.page_size, server.kv_cache_dtype, server.follow_bootstrap_room = 1, "auto", True
    deadline = time.monotonic() + 30
    while not is_up(f"http://127.0.0.1:{port}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return server


def test_a_decode_server_without_the_plugin_is_told_what_is_missing() -> None:
    from sglang_apb.transfer.bootstrap import ZmqKVBootstrapServer

    port = next_port()
    server = bootstrap_server(ZmqKVBootstrapServer, port)
    try:
        asked = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"), -1)
        answer = requests.get(f"http://127.0.0.1:{port}/route", params=asked, timeout=5)
        assert answer.status_code == 409
        assert (
            "--disaggregation-transfer-backend zmq (sglang-apb), the decode server at 127.0.0.1 does not" in answer.text
        )
        assert Lookup(lambda info: None)(f"127.0.0.1:{port}").refusal == ""
    finally:
        server.close()


def test_a_prefill_server_without_the_plugin_is_named() -> None:
    from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

    port = next_port()
    server = bootstrap_server(CommonKVBootstrapServer, port)
    try:
        refusal = Lookup(lambda info: None)(f"127.0.0.1:{port}").refusal
        assert f"the prefill server at 127.0.0.1:{port} does not: start it with the same option" in refusal
    finally:
        server.close()
