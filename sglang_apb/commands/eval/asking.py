"""Asks a server over OpenAI's API, several questions at once, greedily, and streams so as to see the first token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import requests
from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.eval.questions import Answer, AnswerFile, Question
from sglang_apb.commands.report import prefill_report

REQUEST_TIMEOUT_S = 1800.0


def ask_all(
    name: str,
    url: str,
    questions: Sequence[Question],
    answers: AnswerFile,
    *,
    at_once: int,
    stop: threading.Event,
    twice: bool = False,
) -> None:
    """Until every question is answered, `at_once` at a time, or `stop` is set; asked `twice`, the second answer counts.
    Raises CommandError at the first that cannot be answered, and stops; answers until then are kept.
    """

    def ask_unless_stopped(question: Question) -> None:
        if stop.is_set():
            return
        try:
            if twice:
                ask(url, question)
            answers.add(ask(url, question))
        except BaseException:
            stop.set()
            raise
        progress.update()

    pool = ThreadPoolExecutor(at_once)
    try:
        with tqdm(total=len(questions), desc=name, unit="prompt") as progress:
            for _ in pool.map(ask_unless_stopped, questions):
                pass
    finally:  # requests under way end with their server, which is not to wait for them
        pool.shutdown(wait=False, cancel_futures=True)


def ask(url: str, question: Question) -> Answer:
    """Raises CommandError."""
    body: dict[str, Any] = {"model": "default", "max_tokens": question.max_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if question.is_completion:
        path = "/v1/completions"
        body["prompt"] = question.text
    else:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": question.text}]
        if question.prefix:
            body["messages"].append({"role": "assistant", "content": question.prefix})
            body["continue_final_message"] = True
    started = time.perf_counter()
    text, first_token_s, chunks = "", 0.0, []
    for chunk in stream(f"{url}{path}", body):
        chunks.append(chunk)
        text += _text(chunk)
        if text and not first_token_s:
            first_token_s = time.perf_counter() - started
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    if usage is None:
        raise CommandError(f"{url} broke off its answer to {question.key}")
    return Answer(
        key=question.key,
        digest=question.digest,
        text=text,
        num_tokens=usage["prompt_tokens"],
        first_token_s=round(first_token_s or time.perf_counter() - started, 4),
        prefill=next(filter(None, map(prefill_report, reversed(chunks))), {}),
        num_cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
    )


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer. Raises CommandError."""
    with _answering(url), requests.post(url, json=body, stream=True, timeout=REQUEST_TIMEOUT_S) as response:
        _check(url, response)
        for line in response.iter_lines():
            data = line.removeprefix(b"data: ")
            if data and data != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise CommandError(f"{url} answered {event['error']}"[:600])
                yield event


def request(method: str, url: str, **kwargs: Any) -> dict[str, Any]:
    """A JSON answer. Raises CommandError."""
    with _answering(url):
        response = requests.request(method, url, timeout=REQUEST_TIMEOUT_S, **kwargs)
        _check(url, response)
        return dict(response.json())


@contextmanager
def _answering(url: str) -> Iterator[None]:
    try:
        yield
    except (requests.JSONDecodeError, json.JSONDecodeError) as error:
        raise CommandError(f"{url} answered what is no JSON: {error}") from error
    except requests.RequestException as error:  # a URL that is none, too
        raise CommandError(f"{url} does not answer: {error}") from error
    except (ValueError, TypeError) as error:
        raise CommandError(f"{url} answered what is no JSON object: {error}") from error


def _check(url: str, response: requests.Response) -> None:
    if not response.ok:
        raise CommandError(f"{url} answered {response.status_code}: {response.text[:500]}")


def _text(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices") or [{}]
    return choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""
