"""Runs a function on several processes of this machine, joined by NCCL (a GPU each) or gloo."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_apb.commands import CommandError

T = TypeVar("T")


def run_ranks(num_ranks: int, device: str, function: Callable[..., T], *args: Any) -> list[T]:
    """function(group, *args) on every rank; their results by rank, which must be small. All can be pickled.

    Raises CommandError with the traceback of the rank that failed first; the others are ended.
    """
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="sglang-apb-bench-") as folder:
        arguments = (num_ranks, device, f"file://{folder}/ranks", results, function, args)
        try:
            mp.start_processes(_rank, arguments, nprocs=num_ranks, start_method="spawn")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise CommandError(f"a rank failed: {_first_failure(results) or error}") from error
    by_rank: dict[int, T] = dict(results.get() for _ in range(num_ranks))
    return [by_rank[rank] for rank in range(num_ranks)]


def _first_failure(results: Any) -> str | None:
    """Others fail as a consequence, and may be noticed before; but what they say comes later."""
    while not results.empty():
        _, value = results.get()
        if isinstance(value, _Failure):
            return value.traceback
    return None


@dataclass(frozen=True)
class _Failure:
    traceback: str


def _rank(
    rank: int,
    num_ranks: int,
    device: str,
    meeting_point: str,
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // num_ranks, 1))
    backend = "nccl" if device == "cuda" else "gloo"
    own = torch.device(device, rank) if device == "cuda" else None  # else NCCL's barrier has to guess it
    dist.init_process_group(backend, init_method=meeting_point, rank=rank, world_size=num_ranks, device_id=own)
    try:
        results.put((rank, function(dist.group.WORLD, *args)))
        dist.barrier()
    except Exception:
        results.put((rank, _Failure(traceback.format_exc())))
        raise
    finally:
        dist.destroy_process_group()
