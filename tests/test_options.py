"""The command line: our options reach every process, what cannot work is refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PARSE = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang.srt.plugins.hook_registry import HookRegistry
args = prepare_server_args(sys.argv[1:])
args.resolve_once()
import pickle
args = pickle.loads(pickle.dumps(args))
from sglang.srt.arg_groups.overrides import resolved_view
view = resolved_view(args)
print("OPTIONS", getattr(args, "plugin_options", None), view.tp_size, view.attn_cp_size)
print("PATCHED", *sorted(HookRegistry._patched), sep="\\n")
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


def parse(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What SGLang makes of a command line, in a process of its own as hooks stay where they are put."""
    return subprocess.run([sys.executable, "-c", PARSE, *arguments], capture_output=True, text=True, timeout=300)


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
    result = parse("--model-path", model, "--disaggregation-mode", mode, "--disaggregation-transfer-backend", "zmq")
    assert result.returncode == 0, result.stderr[-2000:]
    hooked = "sglang.srt.disaggregation.prefill.is_unadmitted_reject" in patched(result)
    assert hooked == (mode == "prefill")
    assert "sglang.srt.disaggregation.utils.get_kv_class" in patched(result)


def test_help_shows_our_options() -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
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
    serve = [sys.executable, "-c", "from sglang.cli.main import main; main()", "serve", "--model-path", model]
    command = [*serve, "--prefill-backend", "apb", "--sp-size", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert "--sp-size must be at least 1, not 0" in ended.stderr


APB = ("--prefill-backend", "apb")
ZMQ = ("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "zmq")


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
    (*APB, "--disaggregation-mode", "decode"): "belongs on the prefill server",
    (*APB, "--tokenizer-worker-num", "2"): "--tokenizer-worker-num (2) does not go with --prefill-backend apb",
    (*APB, "--enable-flexkv"): "--enable-flexkv (True) does not go with",
    (*APB, *ZMQ, "--disaggregation-enable-kv-checksum"): "--disaggregation-enable-kv-checksum (True) does not go with",
    (*APB, *ZMQ, "--optimistic-prefill-attempts", "1"): "--optimistic-prefill-attempts (1) does not go with",
    ("--kv-transfer-config", "{}"): "--kv-transfer-config needs --disaggregation-transfer-backend zmq",
    (*ZMQ, "--kv-transfer-config", '{"key": 1}'): "unknown option 'key' of --kv-transfer-config; known: secret_key",
    (*ZMQ, "--host", "192.0.2.1"): "would send KV unencrypted from 192.0.2.1",
}
SUPPORTED = "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"


@pytest.fixture(scope="module")
def refusals(model: str, gemma: str) -> list[tuple[int, str]]:
    """Exit status and standard error of each command line in REFUSED, then of one with Gemma."""
    lines = [["--model-path", model, *arguments] for arguments in REFUSED]
    lines.append(["--model-path", gemma, *APB])
    command = [sys.executable, "-c", REFUSE, json.dumps(lines)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.splitlines()
    return [tuple(json.loads(line.removeprefix("REFUSED "))) for line in said if line.startswith("REFUSED ")]


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
    server_args = SimpleNamespace(device="cuda", base_gpu_id=0, gpu_id_step=1)
    with pytest.raises(options.OptionError, match=r"--sp-size 4 needs 4 GPUs.*this machine has 2: use --sp-size 2"):
        options._check_gpus(server_args, options.PluginOptions("apb", 4))


ANOTHER_SGLANG = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.5.24" if name == "sglang" else real(name)
sys.argv = ["sglang.launch_server", *sys.argv[1:]]
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def test_another_sglang_is_refused_in_one_sentence_before_any_patch(model: str) -> None:
    """From 0.5.20 on a hook on `ServerArgs.__init__` was accepted and never ran: every prompt would have run exact."""
    command = [sys.executable, "-c", ANOTHER_SGLANG, "--model-path", model, *APB]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
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
