"""A server under load: prompts that are sent while others run, each streamed and timed."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=None)


@dataclass
class Streamed:
    """One request, its times in seconds: `asked` since the load began, `first` from then to its first token, `between`
    its tokens. Without a first token `waited` says for how long it had none, and `reason` why, if it was refused.
    """

    kind: str
    num_tokens: int
    asked: float
    first: float | None = None
    waited: float = 0.0
    between: list[float] = field(default_factory=list)
    reason: str | None = None

    def within(self, seconds: float) -> bool:
        return self.first is not None and self.first <= seconds


class Load:
    """What has been asked of one server so far. `url`: its /generate; every answer has `output_tokens` tokens."""

    def __init__(self, url: str, output_tokens: int) -> None:
        self.streamed: list[Streamed] = []
        self._url = f"{url}/generate"
        self._sampling = {"max_new_tokens": output_tokens, "ignore_eos": True, "temperature": 0}
        self._began = time.perf_counter()
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Those that have no answer when it ends are left: their clients go."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=_TIMEOUT) as self._session:
            self._began = time.perf_counter()
            yield

    @property
    def seconds(self) -> float:
        """Since the load began."""
        return time.perf_counter() - self._began

    async def ask(self, kind: str, token_ids: Sequence[int]) -> Streamed:
        """Returns when the answer has ended, or there will be none."""
        assert self._session is not None
        body = json.dumps({"input_ids": token_ids, "sampling_params": self._sampling, "stream": True}).encode()
        one = Streamed(kind, len(token_ids), round(self.seconds, 3))
        self.streamed.append(one)
        started = time.perf_counter()
        times: list[float] = []
        try:
            async with self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as got:
                if not got.ok:
                    one.reason = f"HTTP {got.status}: {(await got.text())[:300]}"
                    return one
                async for line in got.content:
                    if line.startswith(b"data: {"):
                        one.reason = one.reason or _why_ended(line)
                        times.append(time.perf_counter() - started)
        except aiohttp.ClientError as error:
            one.reason = f"no answer: {error}"[:300]
        finally:
            one.waited = round(time.perf_counter() - started, 4)
            if times and one.reason is None:
                one.first = round(times[0], 4)
                one.between = [round(later - earlier, 4) for earlier, later in pairwise(times)]
        return one

    async def ask_steadily(
        self, kind: str, prompts: Callable[[int], Sequence[int]], rate: float, is_over: Callable[[], bool]
    ) -> None:
        """`rate` prompts a second, however long their answers take, until `is_over`; returns when all have ended."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(1 << 30):
                await asyncio.sleep(number / rate - self.seconds)
                if is_over():
                    return
                tasks.create_task(self.ask(kind, prompts(number)))


async def at_most(seconds: float, work: Awaitable[Any]) -> None:
    """`work`, which is left when it takes longer."""
    with suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)


def _why_ended(line: bytes) -> str | None:
    event = json.loads(line.removeprefix(b"data: "))
    if "error" in event:
        return str(event["error"])[:300]
    finish = event.get("meta_info", {}).get("finish_reason") or {}
    return f"aborted: {finish.get('message')}" if finish.get("type") == "abort" else None


@dataclass(frozen=True)
class Quantile:
    """Of times to the first token, in seconds. `is_bound`: whoever it is of had waited so long, and had none."""

    seconds: float
    is_bound: bool

    def __str__(self) -> str:
        return f"{'> ' if self.is_bound else ''}{self.seconds:.2f} s"


def first_token(streamed: Sequence[Streamed], share: float) -> Quantile | None:
    """The time that `share` of them were answered within; None of none."""
    times = sorted((math.inf, one.waited) if one.first is None else (one.first, 0.0) for one in streamed)
    if not times:
        return None
    first, waited = times[min(math.ceil(share * len(times)), len(times)) - 1]
    return Quantile(waited, True) if first == math.inf else Quantile(first, False)


def between_tokens(streamed: Sequence[Streamed], share: float) -> float | None:
    """Seconds, over all tokens but first ones; None where there are none."""
    gaps = [gap for one in streamed for gap in one.between]
    if len(gaps) < 2:
        return gaps[0] if gaps else None
    return statistics.quantiles(gaps, n=100, method="inclusive")[round(100 * share) - 1]
