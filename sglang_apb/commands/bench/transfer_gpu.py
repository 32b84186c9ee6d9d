"""`bench transfer --device cuda`: pools in GPU memory, and NCCL beside our data planes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.transfer_prompts import PLAIN_NCCL, Prompt
from sglang_apb.transfer.memory.gpu_pages import CudaPages
from sglang_apb.transfer.memory.pages import HostPages
from sglang_apb.transfer.planes.base import Pool
from sglang_apb.transfer.protocol.compat import Compat
from sglang_apb.transfer.protocol.wire import PageIds

# So many blocks of 256 MB that messages hide behind NVLink: see docs/transfer.md.
LARGE_BUFFER_MB = 1024
_AUX_BYTES = 1024
_HEADS = range(1)


class GpuPool:
    """A KV pool of exactly the prompt's pages, a token each: prefill's on the first GPU, decode's on the last."""

    poll_s = 0.0001

    def __init__(self, prompt: Prompt, fill: int, *, is_prefill: bool):
        self.prompt = prompt
        self.device = torch.device("cuda", 0 if is_prefill else torch.cuda.device_count() - 1)
        torch.cuda.set_device(self.device)
        lens = [prompt.item_len] * prompt.num_buffers
        # In one piece, so that one NCCL call moves it.
        size = prompt.item_len * prompt.num_tokens
        self.whole = torch.empty(prompt.num_buffers, size, dtype=torch.uint8, device=self.device)
        for index, buffer in enumerate(self.whole):
            buffer.fill_((fill + index) % 256)
        torch.cuda.synchronize()
        self.pool = Pool(CudaPages(list(self.whole), lens), _HEADS, page_size=1)
        self.aux = HostPages([np.zeros(_AUX_BYTES, np.uint8)], [_AUX_BYTES])
        self.compat = Compat("bench", "bench", "bfloat16", 1, 1, lens, [_AUX_BYTES])

    def ids(self, *, scattered: bool) -> PageIds:
        return page_ids(self.prompt, scattered=scattered)

    def check(self, fill: int) -> None:
        """Raises CommandError unless every buffer is filled as the other side's is; then forgets it."""
        for index, buffer in enumerate(self.whole):
            if not bool((buffer == (fill + index) % 256).all()):
                raise CommandError(f"buffer {index} has not arrived whole: this is a bug")
            buffer.zero_()
        torch.cuda.synchronize()


def page_ids(prompt: Prompt, *, scattered: bool) -> PageIds:
    ids = np.arange(prompt.num_tokens, dtype=np.int64)
    return np.random.default_rng(0).permutation(ids) if scattered else ids


def check_two_gpus() -> None:
    """Raises OSError where both processes have one GPU, which NCCL does not connect with itself."""
    if torch.cuda.device_count() == 1:
        raise OSError("NCCL needs two GPUs")


@contextlib.contextmanager
def receiving(pool: GpuPool, pipe: Connection) -> Iterator[Callable[[], float]]:
    """NCCL's own send and receive of the whole pool. Raises OSError where both processes have one GPU."""
    import torch.distributed as dist

    check_two_gpus()
    store = dist.TCPStore("127.0.0.1", 0, world_size=2, is_master=True, wait_for_workers=False)
    pipe.send((PLAIN_NCCL, store.port))
    _join(pool, store, rank=1)

    def once() -> float:
        started = time.perf_counter()
        pipe.send("go")
        dist.recv(pool.whole, src=0)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    try:
        yield once
    finally:
        pipe.send("end")
        dist.destroy_process_group()


def send(pool: GpuPool, port: int, pipe: Connection) -> None:
    """The other side."""
    import torch.distributed as dist

    _join(pool, dist.TCPStore("127.0.0.1", port, world_size=2, is_master=False), rank=0)
    while pipe.recv() == "go":
        dist.send(pool.whole, dst=1)
        torch.cuda.synchronize()
    dist.destroy_process_group()


def _join(pool: GpuPool, store: Any, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, device_id=pool.device)
