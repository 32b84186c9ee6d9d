"""Pages that the decode rank's GPU reads where they lie in the prefill rank's pool: one machine, one user.

    decode maps the pool, over a Unix socket (`handles.py`)
              <--  OFFER: a block, and its pages in the pool     prefill
    decode copies them into its own pool
    decode    DONE                                          -->
              <--  KEPT: until DONE they were the request's

Since decode reads pages later than it hears of them, a request is complete with KEPT only.
"""

from __future__ import annotations

import logging
from functools import partial

from sglang_apb.transfer.memory.pages import HostPages
from sglang_apb.transfer.planes.base import OpenReceive, OpenSend, Pool, impossible
from sglang_apb.transfer.planes.cuda_ipc.halves import NAME, CudaIpcReceive, CudaIpcSend
from sglang_apb.transfer.planes.cuda_ipc.handles import MappingError
from sglang_apb.transfer.planes.cuda_ipc.mapped import CudaRemotePool, export
from sglang_apb.transfer.protocol.config import TransferConfig

logger = logging.getLogger(__name__)


def send_half(pool: Pool, config: TransferConfig) -> OpenSend | None:
    if not _is_possible(pool, config) or isinstance(pool.pages, HostPages):
        return None
    try:
        memory = export(pool.pages, pool.heads)
    except MappingError as error:
        if config.plane == NAME:
            raise impossible(NAME, str(error)) from error
        logger.info("KV transfer: this rank's pool cannot be read where it lies: %s", error)
        return None
    return partial(CudaIpcSend, memory=memory)


def receive_half(pool: Pool, config: TransferConfig) -> OpenReceive | None:
    if not _is_possible(pool, config) or isinstance(pool.pages, HostPages):
        return None
    map_memory = partial(CudaRemotePool, pages=pool.pages, heads=pool.heads, page_size=pool.page_size)
    return partial(CudaIpcReceive, map_memory=map_memory)


def _is_possible(pool: Pool, config: TransferConfig) -> bool:
    in_host_memory = isinstance(pool.pages, HostPages)
    if config.plane == NAME and in_host_memory:
        raise impossible(NAME, "KV is not in GPU memory")
    return config.may_use(NAME) and not in_host_memory
