"""`sglang-apb demo`: a question about a long document, answered by a cluster on this machine."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from sglang_apb.commands import CommandError, model
from sglang_apb.commands.report import prefill_report
from sglang_apb.commands.servers import LocalCluster, default_sp_size, num_gpus

HELP = "start a cluster, ask twice about a document of 7,000 tokens, show what ran, stop"
DOCUMENT = Path(__file__).with_name("constitution.txt")
_ANSWER_TOKENS = 24
_TIMEOUT_S = 1800.0
_CLOCK_INTERVAL_S = 10.0
# The document is shorter than what is worth it on one GPU.
_CONFIG = '{"min_tokens": 2048}'


@dataclass(frozen=True)
class Question:
    """A model of 135M parameters finds the place when the answer's first words are given. Without the document it goes
    on with something else.
    """

    text: str
    answer_start: str
    expected: str


QUESTIONS = (
    Question(
        "In suits at common law, from what value in controversy on is the right of trial by jury preserved?",
        "In Suits at common law, the right of trial by jury shall be preserved where the value in controversy shall "
        "exceed",
        "twenty dollars",
    ),
    Question(
        "When shall the Congress assemble?",
        "The Congress shall assemble at least once in every Year, and such Meeting shall be on the first",
        "Monday in December",
    ),
)


@dataclass(frozen=True)
class Answer:
    """`num_cached_tokens` of the prompt were found in the prefix cache; `first_token_s` is the time to the first token;
    `prefill` as `prefill_report` gives it.
    """

    text: str
    num_prompt_tokens: int
    num_cached_tokens: int
    first_token_s: float
    prefill: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", type=Path, default=Path(".demo"), help="for the model and the logs")
    parser.add_argument("--model", help="another model folder or hub name, instead of SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, default=30000, help="the router's; the next 6 are used too")


def run(args: argparse.Namespace) -> int:
    model_name = args.model or _smollm2(args.directory / "model")
    log_dir = args.directory / "logs"
    sp_size = default_sp_size()
    where = f"{num_gpus()} GPU(s)" if num_gpus() else "the CPU"
    _say(f"starting prefill on {sp_size} rank(s), decode and router on {where}; logs in {log_dir.absolute()}")
    with LocalCluster(
        model_name,
        port=args.port,
        log_dir=log_dir,
        sp_size=sp_size,
        arguments=["--enable-cache-report"],
        prefill_arguments=["--prefill-backend-config", _CONFIG],
        report=_say,
    ) as cluster:
        cluster.wait_ready()
        document = DOCUMENT.read_text()
        print(f"\nDocument: {document.splitlines()[0]}\n", flush=True)
        answers = [ask(cluster.url, document, question) for question in QUESTIONS]
    print(describe(answers))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        _check(question, answer)
    return 0


def _check(question: Question, answer: Answer) -> None:
    if answer.prefill.get("method") != "apb":
        raise CommandError("the prompt was not prefilled with APB; the logs say why")
    if question.expected not in answer.text:
        raise CommandError(f"the answer is wrong: {question.expected!r} was expected")


def ask(url: str, document: str, question: Question) -> Answer:
    """Asks about `document` and prints the answer as it comes, in brackets what the model was given."""
    print(f"Question: {question.text}", flush=True)
    chunks = []
    first_token_s = 0.0
    started = time.perf_counter()
    with _clock("reading the document") as first_token:
        for chunk in _stream(url, document, question):
            chunks.append(chunk)
            if _text(chunk) and not first_token.is_set():
                first_token_s = time.perf_counter() - started
                first_token.set()
                print(f"Answer:   [{question.answer_start}]", end="", flush=True)
            print(_text(chunk), end="", flush=True)
    print("\n")
    usage = next(filter(None, (chunk.usage for chunk in reversed(chunks))), None)
    details = usage and usage.prompt_tokens_details
    return Answer(
        text="".join(map(_text, chunks)),
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        num_cached_tokens=(details.cached_tokens or 0) if details else 0,
        first_token_s=first_token_s,
        prefill=next(filter(None, map(prefill_report, reversed(chunks))), {}),
    )


def describe(answers: Sequence[Answer]) -> str:
    """What ran for the first, a line each, and how long each took."""
    answer, *later = answers
    prefill = answer.prefill
    lines = {
        "prompt": f"{answer.num_prompt_tokens:,} tokens",
        "time to first token": f"{answer.first_token_s:.1f} s",
        "method": prefill.get("method", "unknown"),
        "ranks": prefill.get("num_ranks", "unknown"),
        "blocks": prefill.get("num_blocks", "unknown"),
        "attention work": _formatted(prefill.get("attention_share"), "{:.0%} of exact attention's"),
        "KV sent": _formatted(prefill.get("kv_bytes"), f"{{:,}} bytes over {prefill.get('kv_data_plane', 'zmq')}"),
        "during prefill": _formatted(prefill.get("kv_bytes_hidden"), "{:,} of them"),
    }
    for again in later:
        lines["another question"] = f"{again.first_token_s:.1f} s, {again.num_cached_tokens:,} tokens found again"
    return "\n".join(f"{name:<20} {value}" for name, value in lines.items())


def _stream(url: str, document: str, question: Question) -> Iterator[Any]:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=_TIMEOUT_S, max_retries=0)
    yield from client.chat.completions.create(
        model="default",
        messages=[
            {"role": "user", "content": f"{document}\n\n{question.text}"},
            {"role": "assistant", "content": question.answer_start},
        ],
        max_tokens=_ANSWER_TOKENS,
        temperature=0,
        stop=[".", ","],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"continue_final_message": True},
    )


def _text(chunk: Any) -> str:
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


def _formatted(value: Any, template: str) -> str:
    return "unknown" if value is None else template.format(value)


@contextmanager
def _clock(what: str) -> Iterator[threading.Event]:
    """Tells every few seconds how long `what` has taken, until the event that it yields is set."""
    done = threading.Event()

    def tell() -> None:
        started = time.monotonic()
        while not done.wait(_CLOCK_INTERVAL_S):
            _say(f"{what}, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        done.set()
        thread.join()


def _smollm2(directory: Path) -> str:
    if not (directory / "config.json").exists():
        _say(f"making the model in {directory}")
        model.make("smollm2", directory)
    return str(directory)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
