"""Two servers that cannot work together say so, at once, and go on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
from conftest import FLOAT32, Plain, next_port
from transfer_peers import wait_for

from sglang_apb.commands import servers
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import LocalCluster, LocalService, is_up
from sglang_apb.transfer.protocol.compat import Compat, describe_model, find_difference
from sglang_apb.transfer.sglang.directory import Lookup


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


class OneDecodeServer:
    """Two prefill servers, of SGLang's own kind and with a prefill backend, and a decode server that keeps prefixes."""

    def __init__(self, model: Path, log_dir: Path) -> None:
        self.model, self.log_dir = model, log_dir
        self.ports = {name: next_port() for name in ("stock", "apb", "decode")}
        self.rooms = itertools.count(1)
        ports = {name: self.bootstrap_port(name) for name in ("stock", "apb")}
        groups = [
            self.server("stock", *self.prefill(self.ports["stock"]), "--context-length", "1024"),
            self.server("apb", *self.prefill(self.ports["apb"]), "--prefill-backend", "apb"),
            self.server("decode", "--disaggregation-mode", "decode", "--disaggregation-decode-enable-radix-cache"),
        ]
        self.service = LocalService(groups, self.url("decode"), ports | self.ports)

    def server(self, name: str, *arguments: str) -> ProcessGroup:
        transfer = ("--disaggregation-transfer-backend", "zmq")
        port = self.ports.setdefault(name, next_port())
        used = {name: port, f"{name}'s ranks": port + 1}
        log = self.log_dir / f"{name}.log"
        return servers.server_group(name, str(self.model), used, [*FLOAT32, *transfer, *arguments], log)

    @staticmethod
    def prefill(port: int) -> tuple[str, ...]:
        return "--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(port + 2)

    def bootstrap_port(self, name: str) -> int:
        return self.ports[name] + 2

    def url(self, name: str) -> str:
        return f"http://{servers.HOST}:{self.ports[name]}"

    def wait_up(self) -> None:
        self.service._wait_until(lambda: all(is_up(self.url(name)) for name in self.ports), "starting", 600)

    def ask(self, prefill: str, prompt: list[int], timeout: float = 60) -> list[requests.Response]:
        """What each of the two says to its half of a request, as SGLang's router asks them."""
        where = {"bootstrap_host": servers.HOST, "bootstrap_port": self.bootstrap_port(prefill)}
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "bootstrap_room": next(self.rooms), **where}
        with ThreadPoolExecutor() as pool:
            halves = [
                pool.submit(requests.post, f"{self.url(name)}/generate", json=body, timeout=timeout)
                for name in (prefill, "decode")
            ]
            return [half.result() for half in halves]


@pytest.fixture(scope="module")
def one_decode(plain: Plain, log_dirs: Iterator[Path]) -> Iterator[OneDecodeServer]:
    """Their context lengths differ, too."""
    these = OneDecodeServer(plain.model, next(log_dirs))
    with these.service:
        these.wait_up()
        yield these


@pytest.mark.server
def test_context_lengths_may_differ_for_prompts_that_fit_both(one_decode: OneDecodeServer, plain: Plain) -> None:
    for _ in range(2):
        _, answer = one_decode.ask("stock", plain.prompts[300])
        assert answer.ok, answer.text
        assert tuple(answer.json()["output_ids"]) == plain.answers[300].token_ids[:8]
    assert answer.json()["meta_info"]["cached_tokens"] > 0, "the decode server keeps prefixes of plain prefill"


@pytest.mark.server
def test_sparse_kv_is_not_sent_to_a_decode_server_that_keeps_prefixes(
    one_decode: OneDecodeServer, plain: Plain
) -> None:
    for length in (300, 3000):
        started = time.monotonic()
        for answer in one_decode.ask("apb", plain.prompts[length]):
            assert not answer.ok
            assert "start it without --disaggregation-decode-enable-radix-cache" in answer.text
        assert time.monotonic() - started < 20
    assert one_decode.ask("stock", plain.prompts[300])[1].ok


@pytest.mark.server
def test_two_prefill_servers_of_one_bootstrap_port(one_decode: OneDecodeServer, plain: Plain) -> None:
    port = one_decode.bootstrap_port("stock")
    second = one_decode.server("second", *one_decode.prefill(one_decode.ports["stock"]))
    second.start()
    assert wait_for(lambda: second.exit_status is not None, 120)
    second.stop()
    del one_decode.ports["second"]
    assert second.exit_status == 2
    log = second.log_path.read_text()
    assert f"sglang: error: port {port} for the bootstrap server is not free (Address already in use): end what" in log
    assert "Traceback" not in log and "Load weight" not in log
    assert one_decode.ask("stock", plain.prompts[300])[1].ok


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "m", "input": "Hello"},
    "/encode": {"text": "Hello"},
    "/classify": {"text": "Hello"},
    "/v1/rerank": {"query": "Hello", "documents": ["a", "b"]},
}


@pytest.mark.server
@pytest.mark.parametrize("path", EMBEDDINGS)
@pytest.mark.parametrize("name", ["apb", "decode"])
def test_a_server_of_tokens_is_not_asked_for_embeddings(name: str, path: str, one_decode: OneDecodeServer) -> None:
    answer = requests.post(f"{one_decode.url(name)}{path}", json=EMBEDDINGS[path], timeout=30)
    assert 400 <= answer.status_code < 500, answer.text
    assert is_up(one_decode.url(name))


COMPAT = Compat("Toy", "toy", "float32", 1, 1, [4], [4])


def test_the_context_length_is_not_the_models() -> None:
    config = {"hidden_size": 576, "max_position_embeddings": 8192}
    assert describe_model("Toy", config | {"context_len": 8192}) == describe_model(
        "Toy", config | {"context_len": 4096}
    )
    assert describe_model("Toy", config)[1] != describe_model("Toy", config | {"max_position_embeddings": 4096})[1]


@pytest.mark.parametrize(
    ("prefill_backend", "reuses_kv", "is_refused"), [("apb", True, True), ("apb", False, False), ("", True, False)]
)
def test_kv_that_depends_on_the_question_is_not_for_a_decode_cache(
    prefill_backend: str, reuses_kv: bool, is_refused: bool
) -> None:
    prefill = msgspec.structs.replace(COMPAT, prefill_backend=prefill_backend)
    decode = msgspec.msgpack.decode(
        msgspec.msgpack.encode(msgspec.structs.replace(COMPAT, reuses_kv=reuses_kv)), type=Compat
    )
    difference = find_difference(prefill, decode)
    assert bool(difference) == is_refused
    if difference:
        assert "runs --prefill-backend apb" in difference
        assert difference.endswith("start it without --disaggregation-decode-enable-radix-cache.")


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
    from sglang_apb.transfer.sglang.bootstrap import ZmqKVBootstrapServer

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
