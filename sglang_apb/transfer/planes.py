"""Which way a pair of ranks moves pages: `data_plane` of `--kv-transfer-config`."""

from __future__ import annotations

import logging
from functools import partial

from sglang_apb.transfer.config import CUDA_IPC, OPTION, ZMQ
from sglang_apb.transfer.cuda_ipc import CudaRemotePool, export
from sglang_apb.transfer.direct import DirectError, MapMemory, Memory
from sglang_apb.transfer.pages import CudaPages, HostPages

logger = logging.getLogger(__name__)


def memory_to_offer(pages: HostPages | CudaPages, heads: range, plane: str) -> Memory | None:
    """Prefill: what decode ranks of this machine need to read `pages` where they lie; None when they cannot.

    Raises ValueError when the setting asks for what is not possible.
    """
    if plane == ZMQ:
        return None
    try:
        return export(_in_gpu_memory(pages), heads)
    except DirectError as error:
        _insist(plane, error)
        return None


def mapper(pages: HostPages | CudaPages, heads: range, page_size: int, plane: str) -> MapMemory | None:
    """Decode: how to map a prefill rank's pool beside `pages`; None when it is not to be tried.

    Raises ValueError when the setting asks for what is not possible.
    """
    if plane == ZMQ:
        return None
    try:
        return partial(CudaRemotePool, pages=_in_gpu_memory(pages), heads=heads, page_size=page_size)
    except DirectError as error:
        _insist(plane, error)
        return None


def _in_gpu_memory(pages: HostPages | CudaPages) -> CudaPages:
    if isinstance(pages, HostPages):
        raise DirectError("KV is not in GPU memory")
    return pages


def _insist(plane: str, error: DirectError) -> None:
    if plane == CUDA_IPC:
        raise ValueError(f"data_plane {CUDA_IPC!r} of {OPTION} is not possible here ({error}): use 'auto' or {ZMQ!r}.")
    logger.info("KV transfer: KV goes over zmq: %s", error)
