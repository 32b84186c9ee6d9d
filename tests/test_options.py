"""The command line: our options reach every process, what cannot work is refused in one sentence."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import next_port
from preloaded import run_python

from sglang_apb.transfer.protocol.config import TransferConfig

PARSE = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang_apb.patches import _patch
args = prepare_server_args(sys.argv[1:])
args.resolve_once()
import pickle
args = pickle.loads(pickle.dumps(args))
from sglang.srt.arg_groups.overrides import resolved_view
view = resolved_view(args)
print("OPTIONS", getattr(args, "plugin_options", None), view.tp_size, view.attn_cp_size)
print("PATCHED", *sorted(target for target, _ in _patch._applied), sep="\\n")
"""
# Many command lines in one process, since importing SGLang takes longer than all of them.
REFUSE = """
import contextlib, io, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            prepare_server_args(arguments).resolve_once()
        status = 0
    except SystemExit as end:
        status = end.code
    print("REFUSED", json.dumps([status, said.getvalue()]))
"""


LAUNCH = """
import runpy, sys
sys.argv = ["sglang.launch_server", *sys.argv[1:]]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def parse(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What SGLang makes of a command line, in a process of its own as hooks stay where they are put."""
    return run_python(PARSE, *arguments)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> str:
    return str(tiny())


def patched(result: subprocess.CompletedProcess[str]) -> set[str]:
    return set(result.stdout.partition("PATCHED")[2].split())


def test_without_our_options_nothing_but_the_command_line_is_patched(model: str) -> None:
    from sglang_apb.patches import portable_cpu, scheduler_process, server_args

    allowed = {patch.target for patch in (*server_args.PATCHES, *scheduler_process.PATCHES, *portable_cpu.PATCHES)}
    result = parse("--model-path", model)
    assert result.returncode == 0, result.stderr[-2000:]
    assert patched(result) <= allowed
    assert "OPTIONS PluginOptions(backend=None, sp_size=1, config_text=None, transfer_text=None) 1 1" in result.stdout


def test_our_options_travel_in_the_pickle_and_set_the_ranks(model: str) -> None:
    result = parse("--model-path", model, "--prefill-backend", "apb", "--sp-size", "3")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "OPTIONS PluginOptions(backend='apb', sp_size=3, config_text=None, transfer_text=None) 3 3" in result.stdout
    assert "sglang.srt.model_executor.model_runner.ModelRunner._forward_raw" in patched(result)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_refused_prompt_reaches_its_sender_on_prefill_servers_only(mode: str, model: str) -> None:
    """SGLang's registry hooks a function in every module that has it: decode would lose its own refusals."""
    port = ("--disaggregation-bootstrap-port", str(next_port()))
    transfer = ("--disaggregation-mode", mode, "--disaggregation-transfer-backend", "zmq", *port)
    result = parse("--model-path", model, *transfer)
    assert result.returncode == 0, result.stderr[-2000:]
    hooked = "sglang.srt.disaggregation.prefill.is_unadmitted_reject" in patched(result)
    assert hooked == (mode == "prefill")
    assert "sglang.srt.disaggregation.utils.get_kv_class" in patched(result)


def test_help_shows_our_options() -> None:
    text = run_python(LAUNCH, "--help").stdout
    for word in (
        "--prefill-backend {apb}",
        "--sp-size",
        "--prefill-backend-config",
        "question_tokens:",
        "zmq",
        "secret_key:",
    ):
        assert word in text


def test_sglang_serve_knows_our_options(model: str) -> None:
    serve = "from sglang.cli.main import main; main()"
    ended = run_python(serve, "serve", "--model-path", model, "--prefill-backend", "apb", "--sp-size", "0")
    assert ended.returncode != 0
    assert "--sp-size must be at least 1, not 0" in ended.stderr


APB = ("--prefill-backend", "apb")
ZMQ = ("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "zmq")
ZMQ = (*ZMQ, "--disaggregation-bootstrap-port", str(next_port()))
DECODE = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "zmq")
TAKEN = next_port()

REFUSED = {
    ("--prefill-backend", "abp"): "invalid choice: 'abp' (choose from 'apb')",
    ("--sp-size", "2"): "--sp-size and --prefill-backend-config need --prefill-backend",
    (*APB, "--sp-size", "0"): "--sp-size must be at least 1, not 0",
    (*APB, "--sp-size", "2", "--tp-size", "4"): "--sp-size 2 does not go with --tp-size 4",
    (*APB, "--prefill-backend-config", "{bad"): "not valid JSON",
    (*APB, "--prefill-backend-config", '{"anchors": 1}'): "unknown option 'anchors'",
    (*APB, "--prefill-backend-config", '{"engine": "fa4"}'): "engine must be one of torch, flashinfer, not 'fa4'",
    (*APB, "--prefill-backend-config", '{"engine": "flashinfer"}', "--dtype", "float32"): "not float32 on",
    (*APB, "--enable-mixed-chunk"): "--enable-mixed-chunk (True) does not go with --prefill-backend apb",
    (*APB, "--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"): "--enable-lora (True)",
    (*APB, "--enable-hierarchical-cache"): "--enable-hierarchical-cache (True) does not go with",
    (*APB, "--pp-size", "2"): "--pp-size (2) does not go with",
    (*APB, "--dp-size", "2"): "--dp-size (2) does not go with",
    (*APB, "--attn-dp-size", "2", "--tp-size", "2"): "--attn-dp-size (2) does not go with",
    (*APB, "--use-ray"): "--use-ray (True) does not go with --prefill-backend apb: its processes load no plugins",
    (*APB, "--is-embedding"): "(['LlamaForCausalLM'], --is-embedding) does not go with --prefill-backend apb",
    (*APB, "--disaggregation-mode", "decode"): "belongs on the prefill server",
    (*APB, "--tokenizer-worker-num", "2"): "--tokenizer-worker-num (2) does not go with --prefill-backend apb",
    (
        *APB,
        "--schedule-policy",
        "shortest-prefill-first",
    ): "--schedule-policy ('shortest-prefill-first') does not go with",
    (*APB, "--enable-flexkv"): "--enable-flexkv (True) does not go with",
    (*APB, *ZMQ, "--disaggregation-enable-kv-checksum"): "--disaggregation-enable-kv-checksum (True) does not go with",
    (*APB, *ZMQ, "--optimistic-prefill-attempts", "1"): "--optimistic-prefill-attempts (1) does not go with",
    ("--kv-transfer-config", "{}"): "--kv-transfer-config needs --disaggregation-transfer-backend zmq",
    (*ZMQ, "--kv-transfer-config", '{"key": 1}'): "unknown option 'key' of --kv-transfer-config; known: secret_key",
    (*ZMQ, "--host", "192.0.2.1"): "would send KV unencrypted from 192.0.2.1",
    (*ZMQ, "--tokenizer-worker-num", "2"): "--tokenizer-worker-num (2) does not go with --disaggregation-transfer-back",
    (*DECODE, "--tokenizer-worker-num", "2"): "its processes load no plugins; leave it out",
    (*ZMQ, "--use-ray"): "--use-ray (True) does not go with --disaggregation-transfer-backend zmq",
    (*ZMQ, "--pp-size", "2"): "--pp-size (2) does not go with --disaggregation-transfer-backend zmq",
    (*ZMQ, "--dcp-size", "2", "--tp-size", "2"): "--dcp-size (2) does not go with",
    (*DECODE, "--attn-cp-size", "2", "--tp-size", "2"): "--attn-cp-size 2 on a decode server does not go with",
    (*DECODE, "--enable-hisparse"): "--enable-hisparse (True) does not go with --disaggregation-transfer-backend zmq",
    (*DECODE, "--disaggregation-decode-host-receive-threshold", "0.5"): "threshold (0.5) does not go with",
    (*DECODE, "--enable-pd-role-switch"): "--enable-pd-role-switch (True) does not go with",
    (*DECODE, "--is-embedding"): "--is-embedding) does not go with --disaggregation-transfer-backend zmq",
    (*ZMQ, "--disaggregation-bootstrap-port", "70000"): "--disaggregation-bootstrap-port 70000 is no port: choose one",
    (*ZMQ, "--disaggregation-bootstrap-port", "30000"): "--disaggregation-bootstrap-port 30000 is --port, too: choose",
    (*ZMQ, "--disaggregation-bootstrap-port", str(TAKEN)): (
        f"port {TAKEN} for the bootstrap server is not free (Address already in use): end what listens there, or give "
        "another --disaggregation-bootstrap-port"
    ),
}
# What works beside our transfer is let through: plain SGLang's prefill, and decode over more than one scheduler.
ALLOWED: list[tuple[str, ...]] = [
    (*ZMQ, "--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"),
    (*ZMQ, "--detokenizer-worker-num", "2"),
    (*DECODE, "--disaggregation-bootstrap-port", str(TAKEN)),
    (*DECODE, "--tp-size", "3"),
    (*DECODE, "--disaggregation-decode-enable-radix-cache"),
]
SUPPORTED = "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"


@pytest.fixture(scope="module")
def refusals(model: str, gemma: str) -> list[tuple[int, str]]:
    """Exit status and standard error of each command line in REFUSED, then of one with Gemma, while somebody listens
    on the port TAKEN.
    """
    lines = [["--model-path", model, *arguments] for arguments in REFUSED]
    with socket.create_server(("127.0.0.1", TAKEN)):
        return resolve([*lines, ["--model-path", gemma, *APB]])


def resolve(lines: list[list[str]], **environment: str) -> list[tuple[int, str]]:
    """Exit status and standard error of each command line."""
    ended = run_python(REFUSE, json.dumps(lines), **environment)
    said = [line.removeprefix("REFUSED ") for line in ended.stdout.splitlines() if line.startswith("REFUSED ")]
    return [tuple(json.loads(line)) for line in said]


@pytest.fixture(scope="module")
def gemma(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gemma")
    config = (Path(model) / "config.json").read_text().replace("LlamaForCausalLM", "GemmaForCausalLM")
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "gemma"'))
    return str(folder)


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[" ".join(arguments) for arguments in REFUSED])
def test_what_cannot_work_is_refused_in_one_sentence(index: int, refusals: list[tuple[int, str]]) -> None:
    status, said = refusals[index]
    assert status == 2, said
    assert list(REFUSED.values())[index] in said
    assert "Traceback" not in said


def test_what_works_with_our_transfer_is_let_through(model: str) -> None:
    with socket.create_server(("127.0.0.1", TAKEN)):
        ended = resolve([["--model-path", model, *arguments] for arguments in ALLOWED])
    assert [status for status, _ in ended] == [0] * len(ALLOWED), ended


@pytest.mark.parametrize("ours", [APB, ZMQ], ids=["backend", "transfer"])
def test_sglangs_server_in_rust_is_refused(ours: tuple[str, ...], model: str) -> None:
    ((status, said),) = resolve([["--model-path", model, *ours]], SGLANG_RUST_SERVER="1")
    assert status == 2 and "SGLANG_RUST_SERVER does not go with" in said and "unset it" in said


def test_a_draft_model_s_pool_is_not_sent() -> None:
    """On a CPU SGLang itself refuses such algorithms."""
    from types import SimpleNamespace

    from sglang_apb import options

    server_args = SimpleNamespace(
        disaggregation_transfer_backend="zmq",
        disaggregation_mode="decode",
        speculative_algorithm="EAGLE3",
        attn_cp_size=1,
        **{field: allowed[0] for field, (allowed, _, _) in options._REFUSED_WITH_TRANSFER.items()},
    )
    model_config = SimpleNamespace(is_generation=True)
    with pytest.raises(options.OptionError, match=r"--speculative-algorithm EAGLE3 does not go with .*: its draft"):
        options.check_transferable(server_args, model_config, TransferConfig())
    server_args.speculative_algorithm = "NGRAM"
    options.check_transferable(server_args, model_config, TransferConfig())


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (30000, r"port 30001 of a prefill rank, from --kv-transfer-config's port 30000 on, .*is --port, too"),
        (8997, r"port 8998 of a prefill rank.*is --disaggregation-bootstrap-port, too"),
        (65535, r"port 65536 of a prefill rank.*the last one is 65535"),
        (None, r"port \d+ of a prefill rank.*in use"),
    ],
)
def test_ports_that_ranks_cannot_have_are_refused(first: int | None, sentence: str) -> None:
    """Two ranks a host."""
    from types import SimpleNamespace

    from sglang_apb import options

    args = SimpleNamespace(host="127.0.0.1", port=30001, disaggregation_bootstrap_port=8998, tp_size=4, nnodes=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options._check_transfer_ports(args, 0)
        options._check_transfer_ports(args, port + 1)
        with pytest.raises(options.OptionError, match=sentence):
            options._check_transfer_ports(args, port if first is None else first)


def test_an_unsupported_family_is_refused_with_the_supported_ones(refusals: list[tuple[int, str]]) -> None:
    status, said = refusals[-1]
    assert status == 2, said
    assert "does not support GemmaForCausalLM" in said
    assert SUPPORTED in said


def test_more_ranks_than_gpus_is_refused_with_the_number_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    from sglang_apb import options

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    server_args = SimpleNamespace(device="cuda", base_gpu_id=0, gpu_id_step=1, nnodes=1)
    with pytest.raises(options.OptionError, match=r"--sp-size 4 needs 4 GPUs.*this one has 2: use --sp-size 2"):
        options._check_gpus(server_args, options.PluginOptions("apb", 4))
    server_args.nnodes = 2
    options._check_gpus(server_args, options.PluginOptions("apb", 4))
    server_args.base_gpu_id = 1
    with pytest.raises(options.OptionError, match=r"needs 2 GPUs of each host from number 1 on.*use --sp-size 2"):
        options._check_gpus(server_args, options.PluginOptions("apb", 4))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"nnodes": 2}, "--sp-size 3 cannot be shared out over --nnodes 2: .* for example --sp-size 4"),
        ({"node_rank": 3}, "--node-rank 3 must be 0 to 2"),
        ({"dist_init_addr": None}, "--nnodes 3 needs --dist-init-addr HOST:PORT"),
        ({"dist_init_addr": "h1"}, "--dist-init-addr h1 must be HOST:PORT of the first host"),
        ({"host": "127.0.0.1"}, "--host 127.0.0.1 listens to this host alone, and ranks of other hosts register at h1"),
    ],
    ids=str,
)
def test_hosts_that_cannot_share_the_ranks_are_refused(given: dict[str, Any], sentence: str) -> None:
    from types import SimpleNamespace

    from sglang_apb import options
    from sglang_apb.host_group import FirstHost, HostGroupError

    fields = {"nnodes": 3, "node_rank": 2, "dist_init_addr": "h1:25000", "host": "10.0.0.3"}
    fields |= {"disaggregation_transfer_backend": "zmq", "disaggregation_mode": "prefill"}
    assert options.check_hosts(SimpleNamespace(**fields), 3) == FirstHost("h1", 25000)
    assert options.check_hosts(SimpleNamespace(**fields | {"nnodes": 1, "dist_init_addr": None}), 3) is None
    with pytest.raises((options.OptionError, HostGroupError), match=sentence):
        options.check_hosts(SimpleNamespace(**fields | given), 3)


ANOTHER_SGLANG = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.5.24" if name == "sglang" else real(name)
"""


def test_another_sglang_is_refused_in_one_sentence_before_any_patch(model: str) -> None:
    """From 0.5.20 on a hook on `ServerArgs.__init__` was accepted and never ran: every prompt would have run exact."""
    ended = run_python(ANOTHER_SGLANG + LAUNCH, "--model-path", model, *APB)
    assert ended.returncode == 2
    assert "sglang-apb knows SGLang 0.5.23 and no other, and 0.5.24 is installed" in ended.stderr
    assert "unrecognized arguments: --prefill-backend apb" in ended.stderr and "Traceback" not in ended.stderr


def test_a_sglang_that_changed_under_a_patch_is_named() -> None:
    from sglang_apb.patches._patch import Patch, PatchError

    gone = Patch("sglang.srt.server_args.ServerArgs.no_such_method", "after", (), print)
    with pytest.raises(PatchError, match=r"no_such_method does not exist in the installed SGLang .*0\.5\.23"):
        gone.check()
    changed = Patch("sglang.srt.server_args.ServerArgs.add_cli_args", "after", ("parser", "more"), print)
    with pytest.raises(PatchError, match=r"takes \('parser',\), not \('parser', 'more'\)"):
        changed.check()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with a function, and SGLang's registry as if it had hooked nothing."""
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_apb.patches import _patch

    module = ModuleType("toy_of_test_options")
    exec("def greet(name): return [name]", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(_patch, "_applied", set())
    return module


GREET = "toy_of_test_options.greet"


def theirs(original: Callable[..., list[str]], name: str) -> list[str]:
    return [*original(name), "theirs"]


def ours(original: Callable[..., list[str]], name: str) -> list[str]:
    return [*original(name), "ours"]


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_what_another_plugin_has_hooked_is_hooked_by_us_as_well(first: str, toy: Any) -> None:
    """And only once by each, whoever comes first and however often it is asked for."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang_apb.patches import _patch

    patches = (_patch.Patch(GREET, "around", ("name",), ours),)
    if first == "ours":
        _patch.apply(patches)
    HookRegistry.register(GREET, theirs, HookType.AROUND)
    HookRegistry.apply_hooks()
    _patch.apply(patches)
    _patch.apply(patches)
    HookRegistry.apply_hooks()
    assert sorted(toy.greet("a")) == ["a", "ours", "theirs"]


@pytest.mark.parametrize("does", [lambda target, hooks: None, lambda target, hooks: 1 / 0], ids=["nothing", "raises"])
def test_a_hook_that_is_not_in_place_is_an_error(does: Callable[..., Any], toy: Any, monkeypatch: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_apb.patches import _patch

    monkeypatch.setattr(HookRegistry, "_apply_target", does)
    with pytest.raises(_patch.PatchError, match=r"could not patch toy_of_test_options\.greet"):
        _patch.apply([_patch.Patch(GREET, "around", ("name",), ours)])
    assert toy.greet("a") == ["a"]


def test_hooks_of_every_kind_are_found_in_place(toy: Any) -> None:
    from sglang_apb.patches import _patch

    exec("class Kept:\n @classmethod\n def find(cls): return 1\n @staticmethod\n def all(): return 2", toy.__dict__)
    for target in (GREET, "toy_of_test_options.Kept.find", "toy_of_test_options.Kept.all"):
        for kind in ("before", "after", "around", "replace"):
            patch = _patch.Patch(target, kind, None, lambda *args: None)
            assert not patch.is_in_place()
            _patch.apply([patch])
            assert patch.is_in_place()


def test_without_an_option_of_ours_nothing_is_read_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read it takes time, and fails for what SGLang serves without it."""
    from types import SimpleNamespace

    from sglang_apb.patches import insides, server_args

    from sglang_apb import installing

    read: list[str] = []
    view = SimpleNamespace(disaggregation_transfer_backend="mooncake", disaggregation_mode="null")
    monkeypatch.setattr(insides, "resolved", lambda record: view)
    monkeypatch.setattr(insides, "model_config_of", lambda record: read.append("model"))
    monkeypatch.setattr(installing, "install", lambda record: read.append("patches"))
    server_args._check_and_install(SimpleNamespace(), lambda record: None)
    assert read == ["patches"]
