"""The prompts that a server is timed with: random token ids, asked one after the other, and one that is profiled."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import requests
from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.servers import BenchServer
from sglang_apb.commands.bench.table import APB, Timing
from sglang_apb.commands.report import prefill_report

_REQUEST_TIMEOUT_S = 1800.0
# A decode server's address by which SGLang knows that there is none (disaggregation/utils.py: FAKE_BOOTSTRAP_HOST).
_NO_DECODE = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
_SAMPLING = {"max_new_tokens": 1, "ignore_eos": True, "temperature": 0}
# The index of the prompt that is profiled: none of the timed ones has it.
_TRACED = 1 << 20

Advance = Callable[[], Any]


def time_server(server: BenchServer, name: str, args: argparse.Namespace, vocab_size: int) -> list[Timing]:
    """Starts the server, times every length, and ends it. What cannot be timed has the reason in it."""
    timings = [Timing(name, length) for length in args.lengths]
    num_prompts = args.warm_up + args.repeats
    more = _NO_DECODE if args.prefill_only and name == APB else {}
    try:
        with server:
            server.wait_ready()
            with tqdm(total=len(timings) * num_prompts, desc=name, unit="prompt") as progress:
                for timing in timings:
                    prompts = (
                        random_prompt(args.seed, timing.length, index, vocab_size) for index in range(num_prompts)
                    )
                    try:
                        time_prompts(server.url, timing, prompts, args.warm_up, more, progress.update)
                        if args.trace and name == APB and timing.reason is None:
                            trace_prompt(server.url, timing, args.trace, args.seed, vocab_size, more)
                    except requests.RequestException as error:
                        server.raise_why(error)
    except CommandError as error:  # of this server only: the others are still worth their time
        for timing in timings:
            if timing.reason is None and len(timing.seconds) < args.repeats:
                timing.reason = str(error)
    return timings


def time_prompts(
    url: str,
    timing: Timing,
    prompts: Iterator[list[int]],
    num_warm_up: int,
    more: Mapping[str, Any],
    advance: Advance = lambda: None,
) -> None:
    """Asks one prompt after the other, with the fields `more`; stops with the reason when one is refused.

    Raises requests.RequestException when there is no answer.
    """
    for index, token_ids in enumerate(prompts):
        answer = ask(url, token_ids, more)
        timing.reason = answer.reason
        if timing.reason is not None:
            return
        (timing.warm_up_seconds if index < num_warm_up else timing.seconds).append(answer.seconds)
        timing.prefill = prefill_report(answer.content)
        advance()


@dataclass(frozen=True)
class TimedAnswer:
    """`seconds` from the request on; `reason` says why the server did not prefill the prompt, None when it did."""

    seconds: float
    content: dict[str, Any]
    reason: str | None


def ask(url: str, token_ids: list[int], more: Mapping[str, Any]) -> TimedAnswer:
    """One token of an answer, to a request with the fields `more`. Raises requests.RequestException without one."""
    body = json.dumps({"input_ids": token_ids, "sampling_params": _SAMPLING, **more})
    started = time.perf_counter()
    response = requests.post(
        f"{url}/generate", data=body, headers={"Content-Type": "application/json"}, timeout=_REQUEST_TIMEOUT_S
    )
    seconds, reason = round(time.perf_counter() - started, 6), _refusal(response)
    return TimedAnswer(seconds, response.json() if reason is None else {}, reason)


def trace_prompt(url: str, timing: Timing, folder: Path, seed: int, vocab_size: int, more: Mapping[str, Any]) -> None:
    """Profiles one more prompt of the timing's length; files of all ranks go to folder/LENGTH.

    Raises requests.RequestException when there is no answer.
    """
    output = (folder / str(timing.length)).resolve()
    options = {"output_dir": str(output), "activities": ["CPU", "GPU"]}
    requests.post(f"{url}/start_profile", json=options, timeout=_REQUEST_TIMEOUT_S).raise_for_status()
    profiled = Timing(timing.server, timing.length)
    time_prompts(url, profiled, iter([random_prompt(seed, timing.length, _TRACED, vocab_size)]), 0, more)
    requests.post(f"{url}/stop_profile", timeout=_REQUEST_TIMEOUT_S).raise_for_status()


def random_prompt(seed: int, length: int, index: int, vocab_size: int) -> list[int]:
    """Token ids that no other length or index has, the same at every call: a cache has nothing to find."""
    return numpy.random.default_rng([seed, length, index]).integers(vocab_size, size=length).tolist()


def _refusal(response: requests.Response) -> str | None:
    """Why the server did not prefill the prompt; None when it did."""
    if not response.ok:
        return f"HTTP {response.status_code}: {_message(response)}"
    finish = response.json()["meta_info"].get("finish_reason") or {}
    return f"aborted: {finish.get('message')}" if finish.get("type") == "abort" else None


def _message(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:300]
