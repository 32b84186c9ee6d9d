"""Models and servers that the tests share. Servers are real processes on loopback, one service at a time."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fake_openai
import pytest
import tiny_models
from asking import Answer, generate, prompts

from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService

# SGLang imports every model that it knows in every process, which takes longer than the tests' models need to load.
_MODELS_NEEDED = {"llama", "mistral", "qwen2", "qwen3", "transformers"}
_MODELS = Path(importlib.util.find_spec("sglang").origin or "").parent / "srt" / "models"  # type: ignore[union-attr]
os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(
    sorted({path.stem for path in _MODELS.glob("*.py")} - _MODELS_NEEDED)
)

# `make test` stays under 30 minutes on 2 cores without what other tests show in part.
thorough = pytest.mark.skipif(os.environ.get("SGLANG_APB_THOROUGH") != "1", reason="runs with SGLANG_APB_THOROUGH=1")

# Each service gets ports of its own: those of the last one may still be closing.
# Below those that the system gives to whoever connects (32768 and up), and those of other tests.
_ports = itertools.count(12000, 10)


def next_port() -> int:
    """The first of ten ports that no other service of this test run has."""
    return next(_ports)


@pytest.fixture
def openai_server() -> Iterator[Callable[[fake_openai.Say], str]]:
    """The URL of a server that answers what a function says."""
    with fake_openai.servers_that_say() as start:
        yield start


PLAIN_LENGTHS = (300, 1000, 1300, 1700, 2200, 3000)

# Four ranks of a cluster fit beside each other with KV for 12K tokens: 1 GB each.
FLOAT32 = ("--dtype", "float32", "--max-total-tokens", "12000")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, made by `sglang-apb model smollm2`; `make test` does that first."""
    path = Path(os.environ.get("SGLANG_APB_MODEL", ".demo/model"))
    assert (path / "config.json").exists(), f"{path} holds no model: run `sglang-apb model smollm2 {path}` first"
    return path


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random model of the given family, made at its first use."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(family: str = "LlamaForCausalLM") -> Path:
        path = folder / family
        return path if path.exists() else tiny_models.make(family, smollm2, path)

    return make


@dataclass(frozen=True)
class Plain:
    """SmolLM2's first layers, prompts by their lengths, and what one server without any option of ours says to each."""

    model: Path
    num_layers: int
    prompts: dict[int, list[int]]
    answers: dict[int, Answer]


@pytest.fixture(scope="session")
def plain(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, log_dirs: Iterator[Path]) -> Plain:
    """SGLANG_APB_WHOLE_MODEL=1 takes all of the 30 layers (7 times as long)."""
    num_layers = 30 if os.environ.get("SGLANG_APB_WHOLE_MODEL") == "1" else 4
    model = tiny_models.cut(smollm2, num_layers, tmp_path_factory.mktemp("cut"))
    asked = dict(zip(PLAIN_LENGTHS, prompts(model, PLAIN_LENGTHS), strict=True))
    with running(server(model, next(log_dirs))) as url:
        return Plain(model, num_layers, asked, {length: generate(url, prompt) for length, prompt in asked.items()})


@pytest.fixture(scope="session")
def log_dirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh folder at every `next`."""
    return (tmp_path_factory.mktemp("logs") for _ in itertools.count())


@contextmanager
def running(service: LocalService) -> Iterator[str]:
    """The service's URL, once it answers."""
    with service:
        service.wait_ready(timeout=600)
        yield service.url


def server(model: Path, log_dir: Path, *arguments: str) -> LocalServer:
    """One server in float32, where outputs must be equal."""
    return LocalServer(str(model), port=next_port(), log_dir=log_dir, arguments=[*FLOAT32, *arguments])


def cluster(
    model: Path,
    log_dir: Path,
    num_ranks: int,
    *prefill_arguments: str,
    arguments: tuple[str, ...] = (),
    decode_arguments: tuple[str, ...] = (),
) -> LocalCluster:
    """Prefill on `num_ranks` ranks, decode and router over zmq, in float32. `arguments` go to both servers."""
    return LocalCluster(
        str(model),
        port=next_port(),
        log_dir=log_dir,
        sp_size=num_ranks,
        arguments=[*FLOAT32, *arguments],
        prefill_arguments=prefill_arguments,
        decode_arguments=decode_arguments,
    )
