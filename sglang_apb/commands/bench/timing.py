"""Times of things that run in this process: CUDA events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
# The GPU waits this long (some 5 ms) before each timed run, so that the host has launched all when it begins, as it
# has in a model of many layers: else a small kernel's time would be that of its launch.
HEAD_START_CYCLES = 10_000_000


class Observe(Protocol):
    """Runs function(*args) as a part of something, and gives its result."""

    def __call__(self, part: str, function: Callable[..., T], *args: Any) -> T: ...


def unobserved(part: str, function: Callable[..., T], *args: Any) -> T:
    return function(*args)


class Clock:
    """Marks moments: on CUDA in the current stream, without waiting for it."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def settle(self) -> None:
        """Waits until everything launched is done."""
        if self._cuda:
            torch.cuda.synchronize()

    def head_start(self) -> None:
        if self._cuda:
            torch.cuda._sleep(HEAD_START_CYCLES)

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments, once settled."""
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start


@dataclass(frozen=True)
class Stopwatch:
    """Runs something `warm_up` times and then `repeats` times, each after `line_up` (ranks wait for each other)."""

    clock: Clock
    repeats: int
    warm_up: int
    line_up: Callable[[], Any] = field(default=lambda: None)

    def median(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        moments = []
        for index in range(self.warm_up + self.repeats):
            self._start()
            start = self.clock.now()
            run()
            if index >= self.warm_up:
                moments.append((start, self.clock.now()))
        self.clock.settle()
        return statistics.median(self.clock.seconds(start, end) for start, end in moments)

    def median_parts(self, run: Callable[[], Any], recorder: Recorder) -> dict[str, float]:
        """Seconds of each part that `run` shows to the recorder."""
        runs = []
        for _ in range(self.warm_up + self.repeats):
            self._start()
            run()
            self.clock.settle()
            runs.append(recorder.take())
        timed = runs[self.warm_up :]
        return {part: statistics.median(seconds.get(part, 0.0) for seconds in timed) for part in timed[0]}

    def _start(self) -> None:
        self.clock.settle()
        self.line_up()
        self.clock.head_start()


class Recorder:
    """An `Observe` that notes how long parts take. Parts do not lie within each other."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._moments: list[tuple[str, Any, Any]] = []

    def __call__(self, part: str, function: Callable[..., T], *args: Any) -> T:
        start = self._clock.now()
        result = function(*args)
        self._moments.append((part, start, self._clock.now()))
        return result

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        seconds: dict[str, float] = defaultdict(float)
        for part, start, end in self._moments:
            seconds[part] += self._clock.seconds(start, end)
        self._moments.clear()
        return dict(seconds)


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: a large matrix product, and a large copy (bytes read plus bytes written)."""

    flop_per_s: float
    bytes_per_s: float

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype, stopwatch: Stopwatch) -> Ceilings:
        rows, width, num_copied = (16384, 8192, 2**30) if device == "cuda" else (256, 512, 2**24)
        a = torch.randn(rows, width, device=device, dtype=dtype)
        b = torch.randn(width, width, device=device, dtype=dtype)
        product = torch.empty(rows, width, device=device, dtype=dtype)
        flop = 2 * rows * width * width
        flop_per_s = flop / stopwatch.median(lambda: torch.mm(a, b, out=product))
        source = torch.zeros(num_copied, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return cls(flop_per_s, 2 * num_copied / stopwatch.median(lambda: target.copy_(source)))
