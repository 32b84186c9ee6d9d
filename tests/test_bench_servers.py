"""The servers that `sglang-apb bench ttft` starts: which ways of plain SGLang, and their command lines."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import plain
from sglang_apb.commands.bench import servers as bench_servers
from sglang_apb.commands.bench.models import SHAPES

ROOT = Path(__file__).resolve().parents[1]
LLAMA, QWEN3 = "LlamaForCausalLM", "Qwen3ForCausalLM"
BACKENDS = ["flashinfer", "fa3", "fa3-cp"]


def on_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for module in (bench_servers, plain):
        monkeypatch.setattr(module, "num_gpus", lambda: number)


def test_every_server_gets_the_same_arguments_but_for_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 2)
    plans = bench_servers.plan_servers(
        ["flashinfer", "fa3"], gpus=2, dummy_weights=True, config_text='{"block": 64}', extra=["--dtype", "bfloat16"]
    )
    assert [plan.name for plan in plans] == ["flashinfer", "fa3", "apb"]
    flashinfer, fa3, apb = (plan.arguments for plan in plans)
    room = ("--chunked-prefill-size", "65536", "--mem-fraction-static", "0.6", "--cuda-graph-max-bs-prefill", "16384")
    assert flashinfer[:10] == ("--attention-backend", "flashinfer", "--tp-size", "2", *room)
    assert fa3[:10] == ("--attention-backend", "fa3", "--tp-size", "2", *room)
    assert apb[:6] == ("--prefill-backend", "apb", "--sp-size", "2", "--prefill-backend-config", '{"block": 64}')
    assert apb[6:8] == ("--attention-backend", "flashinfer")
    assert flashinfer[10:] == fa3[10:] == apb[8:]
    assert {"--max-running-requests", "--skip-tokenizer-init"} < set(apb)
    assert apb[-2:] == ("--dtype", "bfloat16"), "the user's come last, so that they count"


def test_context_parallelism_has_fa3_and_all_ranks_share_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 4)
    fa3, context_parallel, apb = (plan.arguments for plan in bench_servers.plan_servers(["fa3", "fa3-cp"], gpus=4))
    shared = ("--attn-cp-size", "4", "--enable-prefill-cp", "--cp-strategy", "zigzag")
    assert context_parallel[:9] == ("--attention-backend", "fa3", "--tp-size", "4", *shared)
    assert context_parallel[9:] == fa3[4:]
    first = bench_servers.plan_servers(["fa3-cp"], gpus=4)
    assert first[-1].arguments == apb, "APB's server decodes with fa3, which is no parallelism"


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize("dummy_weights", [False, True])
def test_what_users_have_is_left_on(gpus: int, dummy_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix cache, overlap and CUDA graphs: a figure without them would be nobody's."""
    on_gpus(monkeypatch, gpus)
    for bootstrap_port in (None, 30208):
        plans = bench_servers.plan_servers(
            BACKENDS, gpus=gpus or 1, dummy_weights=dummy_weights, bootstrap_port=bootstrap_port
        )
        for plan in plans:
            assert not [argument for argument in plan.arguments if argument.startswith("--disable")], plan.name
            assert "disabled" not in plan.arguments, plan.name


@pytest.mark.parametrize("pattern", ["benchmarks/*.*", "sglang_apb/commands/bench/*.py", "tests/test_gpu*.py"])
def test_no_measurement_and_no_gpu_test_turns_off_what_users_have(pattern: str) -> None:
    files = list(ROOT.glob(pattern))
    assert files, "the pattern finds nothing"
    for file in files:
        found = re.findall(r"--disable-(?:radix|overlap|prefill|decode|cuda)[\w-]*", file.read_text())
        assert not found, f"{file.name}: {found}"


def test_a_cpu_is_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 0)
    assert plain.default_backends(2, QWEN3) == ["torch_native"]
    assert "--chunked-prefill-size" not in bench_servers.plan_servers(["torch_native"], gpus=1)[0].arguments


@pytest.mark.parametrize(
    ("architecture", "gpus", "expected"),
    [(QWEN3, 2, BACKENDS), (QWEN3, 4, BACKENDS), (QWEN3, 1, BACKENDS[:2]), (LLAMA, 2, BACKENDS[:2])],
)
def test_context_parallelism_is_compared_with_where_sglang_supports_it(
    architecture: str, gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpus(monkeypatch, gpus)
    monkeypatch.setattr(plain, "_has_fa3", lambda: True)
    assert plain.default_backends(gpus, architecture) == expected
    plain.check_backends(expected, gpus, architecture)
    monkeypatch.setattr(plain, "_has_fa3", lambda: False)
    assert plain.default_backends(gpus, architecture) == ["flashinfer"]


@pytest.mark.parametrize(
    ("architecture", "gpus", "reason"),
    [
        (LLAMA, 2, "LlamaForCausalLM: .* only Qwen3ForCausalLM, and cuts the others' heads by the full --tp-size"),
        ("Qwen2ForCausalLM", 2, "Qwen2ForCausalLM"),
        ("MistralForCausalLM", 4, "MistralForCausalLM"),
        (QWEN3, 1, "needs two GPUs or more"),
    ],
)
def test_context_parallelism_that_sglang_does_not_support_is_refused(
    architecture: str, gpus: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpus(monkeypatch, gpus)
    with pytest.raises(CommandError, match=f"--backends fa3-cp .*{reason}"):
        plain.check_backends(["fa3", "fa3-cp"], gpus, architecture)
    plain.check_backends(["fa3"], gpus, architecture)


def test_there_is_a_shape_for_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 2)
    plain.check_backends(["fa3-cp"], 2, SHAPES["qwen3-8b"]["architectures"][0])


@pytest.mark.parametrize(("library", "capability", "expected"), [(True, 9, True), (True, 10, False), (False, 9, False)])
def test_fa3_is_compared_with_where_it_can_run(
    library: bool, capability: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    if library:
        (package / "flash_ops.abi3.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (capability, 0))
    on_gpus(monkeypatch, 1)
    assert plain.default_backends(1, LLAMA) == (["flashinfer", "fa3"] if expected else ["flashinfer"])
