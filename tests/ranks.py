"""Runs a function on several real processes, joined by gloo or NCCL; a failing rank fails the caller."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120, device: str = "cpu"
) -> list[Any]:
    """function(group, *args) on every rank; their results by rank. With `device` "cuda" each has a GPU of its own.

    Raises AssertionError with the rank's traceback when a rank fails, dies or does not end in time.
    """
    context = mp.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, num_ranks, port, device, results, function, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        outcomes = dict(_take(results, processes, timeout_s) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=60)  # where SGLang was imported, leaving takes a while
            process.kill()
    errors = [f"rank {rank} failed:\n{error}" for rank, (error, _) in sorted(outcomes.items()) if error]
    assert not errors, "\n".join(errors)
    for rank, process in enumerate(processes):
        assert process.exitcode == 0, f"rank {rank} exited with {process.exitcode}"
    return [outcomes[rank][1] for rank in range(num_ranks)]


def _take(results: Any, processes: list[Any], timeout_s: float) -> tuple[int, tuple[str | None, Any]]:
    for _ in range(int(timeout_s)):
        try:
            rank, error, value = results.get(timeout=1)
            return rank, (error, value)
        except Exception:  # queue.Empty: look whether anyone can still answer
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            assert not dead, f"a rank died with exit code {dead[0]}"
    raise AssertionError(f"ranks did not end within {timeout_s} s")


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    device: str,
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
        value = function(dist.group.WORLD, *args)
        dist.barrier()
        results.put((rank, None, value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise
    finally:
        results.close()
        results.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
