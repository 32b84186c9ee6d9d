"""What a profiler trace of one sparse prefill says: where the GPU's time went, what of communication nothing hid, and
whether the host ever waited for the GPU between layers. Reads the files of SGLang's `/start_profile`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.table import markdown

COMMUNICATION = "communication"
# Kernels by their names, the first that matches.
_GROUPS = {
    COMMUNICATION: r"nccl|cross_device_reduce",
    "attention": r"PrefillWithKVCache|flash_fwd|FlashAttn",
    "merge": r"_merge_kernel|MergeStates",
    "scores, selection, packing": r"_query_kernel|_key_diff_kernel|_select_kernel|_pack_kernel|MeanOps",
    "matrix products": r"nvjet|gemm|cutlass|splitKreduce",
    "norms, RoPE, gate": r"norm|rope|act_and_mul|silu",
    "KV cache": r"store_kvcache|store_cache",
    "copies": r"Memcpy|Memset|copy|Fill|Cat|gather_kernel",
}
OTHER = "other"
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")
_LAYER = re.compile(r"sparse attention, layer \d+")  # backends/apb.py


@dataclass(frozen=True)
class Interval:
    """A trace's event, in seconds from any origin."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class TraceSummary:
    """Of one rank's prefill, in seconds: `groups` add up each kernel's time, whatever runs beside it.

    `idle`: no kernel runs. `exposed`: only communication does. `waits`: the host's calls that wait for the GPU, from
    the end of the first layer's attention, where all is planned, to the start of the last one's.
    """

    num_layers: int
    span: float
    idle: float
    exposed: float
    groups: dict[str, float]
    waits: tuple[Interval, ...]


def summarize(events: Iterable[dict[str, Any]]) -> TraceSummary:
    """events: `traceEvents` of a torch.profiler trace with one sparse prefill in it; without, raises CommandError."""
    gpu: list[Interval] = []
    layers: list[Interval] = []
    waits: list[Interval] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        start = event["ts"] / 1e6
        found = Interval(event["name"], start, start + event["dur"] / 1e6)
        if event.get("cat") in _GPU:
            gpu.append(found)
        elif event.get("cat") == "user_annotation" and _LAYER.fullmatch(found.name):
            layers.append(found)
        elif event.get("cat") == "cuda_runtime" and _WAITS.match(found.name):
            waits.append(found)
    if not layers or not gpu:
        raise CommandError("the trace shows no sparse prefill on a GPU")
    layers.sort(key=lambda layer: layer.start)
    between = (layers[0].end, layers[-1].start)
    return TraceSummary(
        num_layers=len(layers),
        span=_span(gpu),
        idle=_span(gpu) - _covered(gpu),
        exposed=_covered(gpu) - _covered([kernel for kernel in gpu if group_of(kernel.name) != COMMUNICATION]),
        groups=_groups(gpu),
        waits=tuple(wait for wait in waits if between[0] <= wait.start < between[1]),
    )


def group_of(kernel: str) -> str:
    """Which of the groups a kernel counts to, by its name."""
    return next((group for group, pattern in _GROUPS.items() if re.search(pattern, kernel)), OTHER)


def read(path: Path) -> TraceSummary:
    """Raises CommandError when the file shows no sparse prefill."""
    with gzip.open(path) as file:
        return summarize(json.loads(file.read())["traceEvents"])


def describe(summaries: Sequence[TraceSummary]) -> str:
    """A table with a column a rank, in milliseconds and as shares of each rank's time."""
    names = [group for group in (*_GROUPS, OTHER) if any(group in summary.groups for summary in summaries)]
    rows = [[name, *(_cell(summary.groups.get(name, 0.0), summary) for summary in summaries)] for name in names]
    rows.append(["nothing runs", *(_cell(summary.idle, summary) for summary in summaries)])
    rows.append(["only communication runs", *(_cell(summary.exposed, summary) for summary in summaries)])
    rows.append(["whole prefill", *(f"{summary.span * 1e3:,.1f}" for summary in summaries)])
    table = markdown(["ms", *(f"rank {rank}" for rank in range(len(summaries)))], rows)
    waits = [wait for summary in summaries for wait in summary.waits]
    named = ", ".join(sorted({wait.name for wait in waits}))
    said = f"{len(waits)} ({named})" if waits else "none"
    return f"{table}\n\n- between layers the host waits for the GPU: {said}"


def _cell(seconds: float, summary: TraceSummary) -> str:
    return f"{seconds * 1e3:,.1f} ({seconds / summary.span:.1%})"


def _groups(kernels: Iterable[Interval]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        sums[group_of(kernel.name)] += kernel.end - kernel.start
    return dict(sums)


def _span(intervals: Sequence[Interval]) -> float:
    return max(interval.end for interval in intervals) - min(interval.start for interval in intervals)


def _covered(intervals: Sequence[Interval]) -> float:
    """Length of the intervals' union."""
    covered, end = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda interval: interval.start):
        covered += max(interval.end - max(interval.start, end), 0.0)
        end = max(end, interval.end)
    return covered
